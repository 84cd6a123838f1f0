"""Scenarios of version 0: every kind of file is refused with one line that names the version and the fix."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims.bundle_file import open_bundle
from mtlsign.claims.ledger import witness_state
from mtlsign.claims.ledger.checkpoints import parse_signed_note
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import LedgerView
from mtlsign.claims.statements.envelope import sign
from mtlsign.claims.statements.parsing import disclosed_opening, open_statement
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError, MTLSignError, OldArtifactError
from mtlsign.service.auth.signing import read_verdict
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.claim_bundle import parse_bundle, read_bundle
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import parse_manifest
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.keys.spec import parse_spec
from mtlsign.watermark.kit import open_kit, read_kit

FOLDER = Path(__file__).parents[3] / "golden" / "v0"
KIT: dict[str, Any] = json.loads((FOLDER / "kit.json").read_text("utf-8"))
CLAIM: dict[str, Any] = json.loads((FOLDER / "claim.json").read_text("utf-8"))
ENTRIES = [base64.b64decode(entry) for entry in CLAIM["entries"]]
SECRET = EncryptionSecret.from_kit_key(bytes.fromhex(KIT["kit_key"]))
EMBED, PUBLISH = "Embed the watermark again.", "Create a new ledger and publish again."


@pytest.fixture
def kit_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "kits" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "kit.sealed").write_bytes(base64.b64decode(KIT["kit.sealed"]))
    for name in ("owner.json", "manifest.json"):
        (folder / name).write_text(KIT[name])
    return folder


def message_of(error: type[MTLSignError], call: Callable[[], object]) -> str:
    """Return the message of the expected error, which has one line."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(where: str, tag: str, fix: str) -> str:
    """Return the message for a document of version 0."""
    return f"{where}: The format is '{tag}', version 0, which this release does not read. {fix}"


def test_spec_of_version_0_is_refused() -> None:
    spec = base64.b64decode(KIT["opening"]["spec"])
    assert message_of(KeyMaterialError, lambda: parse_spec(spec)) == expected("spec", "mtlsign/v0", EMBED)


def test_key_opening_of_version_0_is_refused() -> None:
    data = json.dumps(KIT["opening"])
    message = expected("opening", "mtlsign/key-opening/v0", EMBED)
    assert message_of(KeyMaterialError, lambda: KeyOpening.from_json(data)) == message


def test_kit_of_version_0_is_refused(kit_folder: Path) -> None:
    message = expected("manifest.json", "mtlsign/folder/v0", "Embed the watermark and publish again.")
    assert message_of(OldArtifactError, lambda: read_kit(str(kit_folder), SECRET)) == message
    settings = VerifySettings.of({"model": "m", "kit": str(kit_folder)})
    assert message_of(OldArtifactError, lambda: open_kit(settings, str(kit_folder))) == message
    sealed = str(kit_folder / "kit.sealed")
    assert message_of(KeyMaterialError, lambda: read_kit(sealed, SECRET)) == expected("kit", "MTLS v0", EMBED)


def test_folder_of_version_0_is_refused(kit_folder: Path) -> None:
    assert message_of(OldArtifactError, lambda: parse_manifest(KIT["manifest.json"].encode())) == message_of(
        OldArtifactError, lambda: read_model(str(kit_folder))
    )


def test_identity_of_version_0_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    path.write_text(KIT["identity"]["file"])
    passphrase = KIT["identity"]["passphrase"].encode()
    message = message_of(KeyMaterialError, lambda: Identity.load(path, passphrase))
    assert message == expected(
        "owner", "mtlsign/identity/v0", f"Move the file away and create a new identity. {EMBED}"
    )


@pytest.mark.parametrize("index", [0, 1])
def test_statement_of_version_0_is_refused(index: int) -> None:
    tag = f"urn:mtlsign:v0:{CLAIM['kinds'][index]}"
    message = message_of(ClaimError, lambda: open_statement(ENTRIES[index]))
    assert message == expected("statement", tag, PUBLISH)
    assert disclosed_opening(ENTRIES[index]) is None


def test_ledger_of_version_0_is_refused(tmp_path: Path) -> None:
    message = message_of(LedgerError, lambda: LedgerView.from_entries(ENTRIES, []))
    assert expected("statement", "urn:mtlsign:v0:membership", PUBLISH) in message
    path = tmp_path / "ledger.db"
    open_ledger(f"sqlite:///{path}", create=True).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")
    assert message_of(LedgerError, lambda: open_ledger(f"sqlite:///{path}")) == (
        f"ledger: {path} is a ledger of version 0, which this release does not read. {PUBLISH}"
    )


def test_checkpoint_of_version_0_is_refused() -> None:
    message = message_of(ClaimError, lambda: parse_signed_note(CLAIM["head"].encode()))
    assert message == expected("head", "mtlsign/ledger/v0", PUBLISH)


def test_bundle_of_version_0_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "claim.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(zipfile.ZipInfo("bundle.json"), CLAIM["bundle.json"])

    def read() -> None:
        with open_bundle(path) as bundle:
            bundle.claim_index()

    assert message_of(ClaimError, read) == expected("bundle", "mtlsign/bundle/v0", PUBLISH)


def test_witness_state_of_version_0_is_refused(tmp_path: Path) -> None:
    path, identity = tmp_path / "state.json", Identity.generate()
    path.write_text('{"version": "mtlsign/witness/v0", "origin": ""}')
    message = message_of(KeyMaterialError, lambda: witness_state.load(identity, path))
    assert message == expected("witness-state", "mtlsign/witness/v0", f"Move {path} away. {PUBLISH}")
    pin = witness_state.pin_path(identity, "store")
    pin.parent.mkdir(parents=True, exist_ok=True)
    pin.write_text('{"version": "mtlsign/place/v0", "place": "store"}')
    message = message_of(KeyMaterialError, lambda: witness_state.pinned_origin(identity, "store"))
    assert message == expected("witness-state", "mtlsign/place/v0", f"Move {pin} away. {PUBLISH}")


def test_service_refuses_opened_claims_and_kits_of_version_0() -> None:
    bundle = {"opening": KIT["opening"], "reference": ""}
    with pytest.raises(Problem) as caught:
        parse_bundle(bundle)
    assert caught.value.detail == expected("opening", "mtlsign/key-opening/v0", EMBED)
    claim_file = io.BytesIO()
    with zipfile.ZipFile(claim_file, "w") as file:
        file.writestr(zipfile.ZipInfo("bundle.json"), '{"claim":1}')
        file.writestr(zipfile.ZipInfo("entries/1"), ENTRIES[1])
    with pytest.raises(Problem, match="urn:mtlsign:v0:claim"):
        read_bundle(claim_file.getvalue())
    with pytest.raises(Problem, match="owner kit"):
        read_bundle(base64.b64decode(KIT["kit.sealed"]))


def test_verdict_of_version_0_is_refused() -> None:
    envelope = sign(b'{"predicateType":"urn:mtlsign:v0:verdict","predicate":{}}', Identity.generate())
    message = message_of(ClaimError, lambda: read_verdict(envelope))
    assert message == expected("verdict", "urn:mtlsign:v0:verdict", "Verify the model again.")


def test_storage_of_version_0_keeps_its_folder(kit_folder: Path) -> None:
    """Refusing a folder changes nothing in it."""
    storage = open_storage(str(kit_folder))
    before = storage.list()
    message_of(OldArtifactError, lambda: read_kit(str(kit_folder), SECRET))
    assert storage.list() == before
