"""Golden kits and bundle: read by the package, and by a second reader written from the documents."""

from __future__ import annotations

import ast
import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims.bundle import check_bundle
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.conformance import reference_files as reader
from tests.golden import make_files as maker
from tests.unit.claims.scenario import SubstringJudge

GOLDEN: dict[str, Any] = json.loads(maker.FILES_FILE.read_text("utf-8"))
KITS = {"kit key, keyed head": "keyed", "passphrase, free head": "free"}


def files_of(name: str) -> dict[str, bytes]:
    return {file: base64.b64decode(data) for file, data in GOLDEN["kits"][name].items() if file != "id"}


@pytest.mark.parametrize("name", KITS)
def test_package_reads_golden_kit(name: str, tmp_path: Path) -> None:
    folder = tmp_path / GOLDEN["kits"][name]["id"]
    folder.mkdir()
    for file, data in files_of(name).items():
        (folder / file).write_bytes(data)
    secrets = {
        "keyed": EncryptionSecret.from_kit_key(bytes.fromhex(GOLDEN["kit_key"])),
        "free": EncryptionSecret.from_passphrase(GOLDEN["passphrase"].encode()),
    }
    assert read_kit(str(folder), secrets[KITS[name]]) == maker.kits()[KITS[name]]


@pytest.mark.parametrize("name", KITS)
def test_second_reader_reads_golden_kit(name: str) -> None:
    files, kit = files_of(name), maker.kits()[KITS[name]]
    assert reader.read_folder(files) == ["kit.sealed", "owner.json"]
    secret = bytes.fromhex(GOLDEN["kit_key"]) if KITS[name] == "keyed" else GOLDEN["passphrase"].encode()
    opening, info, reference, base_weights, *head = reader.decrypt_kit(files["kit.sealed"], secret)
    assert opening.decode() == kit.opening.to_json() and json.loads(info) == kit.info
    assert (reference, base_weights) == (kit.reference, kit.base_weights)
    assert head == ([] if kit.head is None else [kit.head])


def test_both_readers_read_golden_bundle(tmp_path: Path) -> None:
    path, data = tmp_path / "claim.zip", base64.b64decode(GOLDEN["bundle"]["file"])
    path.write_bytes(data)
    checked = check_bundle(path, SubstringJudge(), pinned=GOLDEN["bundle"]["head"].encode())
    assert checked.dispute.standings[0].standing == "supported"
    second = reader.read_bundle(data)
    assert second["claim"] == checked.entry.index and second["origin"] == checked.view.origin.hex()
    assert (second["size"], second["root"]) == (checked.checkpoint.size, checked.checkpoint.root.hex())
    assert second["entries"] == list(checked.view.entries)
    assert {checked.claim.suspect.hex(), checked.claim.model.hex()} < set(second["blobs"])


def test_golden_files_are_reproducible() -> None:
    """Fixed salts and clocks give equal bytes: kits and bundles contain no other randomness."""
    assert maker.build() == GOLDEN


def test_second_reader_imports_nothing_of_the_package() -> None:
    tree = ast.parse(Path(reader.__file__).read_text("utf-8"))
    names = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("mtlsign") for name in names)
