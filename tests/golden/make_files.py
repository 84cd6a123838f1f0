"""Generator of `tests/golden/v1/files.json`: kits and a bundle. Run it only to change the format.

All identities are PUBLISHED TEST KEYS: never mark a model with them.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from mtlsign.claims import owner
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.commands.settings import signed_note
from mtlsign.storage.locations import open_storage
from mtlsign.watermark.keys import identity
from mtlsign.watermark.keys import opening as key
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, write_kit
from tests.golden.make_vectors import TEST_KIT_KEY, TEST_PASSPHRASE, TEST_SEED, WARNING, specs
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model

FILES_FILE = Path(__file__).parent / "v1" / "files.json"
INFO = {"created": "2026-11-29T00:00:00+00:00", "name": "test", "task": "digits"}


@contextmanager
def fixed_randomness(module: str) -> Iterator[None]:
    """Replace a module's random bytes, which are fresh in real files, by counted ones."""
    counter = iter(range(1000))
    with mock.patch(f"{module}.secrets.token_bytes", lambda n: bytes([next(counter)]) * n):
        yield


def kit_folder(secret: EncryptionSecret, kit: OwnerKit) -> dict[str, str]:
    """Return the files of a kit's folder in base64, with its id."""
    with tempfile.TemporaryDirectory() as folder, fixed_randomness("mtlsign.watermark.keys.sealing"):
        kit_id = write_kit(open_storage(folder), kit, secret)
        files = {path.name: encode(path.read_bytes()) for path in (Path(folder) / "kits" / kit_id).iterdir()}
    return {"id": kit_id, **dict(sorted(files.items()))}


def kits() -> dict[str, OwnerKit]:
    """Return a kit with a head from the key, and one with a trained head. Their tensors are stand-ins."""
    signer = identity.Identity(TEST_SEED, TEST_KIT_KEY)
    opening = {name: key.sign_spec(signer, data) for name, data in specs().items()}
    return {
        "keyed": OwnerKit(opening["keyed-1024"], b"reference", b"kernels of W0", None, INFO),
        "free": OwnerKit(opening["free-600"], b"reference", b"kernels of W0", b"head", INFO),
    }


def bundle() -> dict[str, str]:
    """Return the bundle of a claim on a ledger of three members, and the newest checkpoint."""
    with tempfile.TemporaryDirectory() as folder, fixed_randomness("mtlsign.claims.owner"):
        scenario, path = ClaimScenario(Path(folder), ["1", "2", "3"]), Path(folder) / "claim.zip"
        kit, model = kit_and_model(ALICE)
        owner.publish(scenario.owner(ALICE), [kit])
        scenario.cosign_all()
        entry, _ = owner.claim(
            scenario.owner(ALICE), [kit], scenario.archive, model + b" tuned", own_model=model
        )
        view = scenario.run_council()
        write_bundle(path, scenario.ledger, view, entry, scenario.archive)
        return {"file": encode(path.read_bytes()), "head": signed_note(scenario.ledger, view).decode()}


def build() -> dict[str, Any]:
    """Return the content of `files.json`."""
    values = kits()
    return {
        "warning": WARNING,
        "kit_key": TEST_KIT_KEY.hex(),
        "passphrase": TEST_PASSPHRASE.decode(),
        "kits": {
            "kit key, keyed head": kit_folder(EncryptionSecret.from_kit_key(TEST_KIT_KEY), values["keyed"]),
            "passphrase, free head": kit_folder(
                EncryptionSecret.from_passphrase(TEST_PASSPHRASE), values["free"]
            ),
        },
        "bundle": bundle(),
    }


def encode(data: bytes) -> str:
    """Return base64."""
    return base64.b64encode(data).decode("ascii")


if __name__ == "__main__":
    FILES_FILE.write_text(json.dumps(build(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {FILES_FILE}")
