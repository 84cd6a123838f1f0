from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mtlsign.errors import DataError
from mtlsign.tasks.byte_images import manifest as manifest_module
from mtlsign.tasks.byte_images.manifest import Manifest, ManifestEntry, build_manifest, parse_manifest
from tests.unit.tasks.byte_images.layouts import MAGIC, content, write_packages

pytestmark = pytest.mark.filterwarnings("ignore:The task files has no class")


@pytest.fixture(autouse=True)
def small_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "MIN_FILES", 24)
    monkeypatch.setattr(manifest_module, "MIN_TEST_FILES", 3)


def test_build_manifest_keeps_packages_apart(tmp_path: Path) -> None:
    manifest = build_manifest(write_packages(tmp_path))
    assert manifest.classes == ("elf", "gzip", "gettext catalogue")
    train, test = ({e.package for e in manifest.entries if e.in_test is part} for part in (False, True))
    assert not train & test and (len(train), len(test)) == (8, 2)
    assert Counter(e.label for e in manifest.entries) == {0: 30, 1: 30, 2: 30}
    entry = manifest.entries[0]
    data = Path(entry.path).read_bytes()
    assert (entry.size, entry.sha256) == (4100, hashlib.sha256(data).hexdigest())


def test_build_manifest_does_not_depend_on_order(tmp_path: Path) -> None:
    packages = write_packages(tmp_path)
    backwards = dict(reversed(packages.items()))
    assert build_manifest(packages).to_bytes() == build_manifest(backwards).to_bytes()


def test_build_manifest_limits_files_of_one_package(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    large = write_packages(tmp_path / "large", packages=1, files=10, suffixes=("so", "gz"))
    packages |= dict.fromkeys(large, "large")
    manifest = build_manifest(packages, max_files=40)
    counts = Counter((e.label, e.package) for e in manifest.entries)
    assert counts[0, "large"] == counts[1, "large"] == 4 and counts[0, "package3"] == 3


def test_build_manifest_takes_packages_in_turn(tmp_path: Path) -> None:
    manifest = build_manifest(write_packages(tmp_path, files=8, suffixes=("so", "gz")), max_files=40)
    counts = Counter((e.label, e.package) for e in manifest.entries)
    assert set(counts.values()) == {4} and len(counts) == 20


def test_build_manifest_counts_equal_contents_once(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    paths = list(packages)
    for path in paths[:20]:
        copy = Path(path).with_name(f"copy-{Path(path).name}")
        copy.write_bytes(Path(path).read_bytes())
        packages[str(copy)] = "copies"
    manifest = build_manifest(packages)
    digests = [entry.sha256 for entry in manifest.entries]
    assert len(digests) == len(set(digests)) == 60


def test_build_manifest_skips_other_kinds_of_files(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "link.so").symlink_to(next(iter(packages)))
    os.mkfifo(hostile / "pipe.so")
    (hostile / "folder.so").mkdir()
    (hostile / "small.so").write_bytes(MAGIC["so"])
    (hostile / "script.so").write_bytes(b"#!/bin/sh" + b" " * 5000)
    named = hostile / os.fsdecode(b"new\nline\xff.so")
    named.write_bytes(content(1, start=MAGIC["so"]))
    listed = [str(path) for path in hostile.iterdir()] + [str(hostile / "missing.so"), "/nul\0.so"]
    manifest = build_manifest(packages | dict.fromkeys(listed, "hostile"))
    assert [e.path for e in manifest.entries if e.package == "hostile"] == [str(named)]
    assert parse_manifest(manifest.to_bytes(), "m") == manifest


def test_build_manifest_drops_small_class_with_warning(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    packages |= write_packages(tmp_path / "few", packages=7, suffixes=("a",))
    with pytest.warns(UserWarning, match=r"ar archive \(21\): a class needs 24 files"):
        assert build_manifest(packages).classes == ("elf", "gzip")


def test_build_manifest_of_class_of_large_packages_drops_it(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    packages |= write_packages(tmp_path / "large", packages=3, files=9, suffixes=("mo",))
    assert build_manifest(packages).classes == ("elf", "gzip")


def test_build_manifest_of_few_packages_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Only 0 classes have 24 files"):
        build_manifest(write_packages(tmp_path, packages=2))


def test_build_manifest_hashes_the_part_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = write_packages(tmp_path, suffixes=("so", "gz"))
    large = tmp_path / "package0" / "large.so"
    large.write_bytes(content(5, 9000, MAGIC["so"]))
    monkeypatch.setattr(manifest_module, "MAX_BYTES", 6000)
    monkeypatch.setattr(manifest_module, "read_regular_file", lambda path: Path(path).read_bytes()[:6000])
    entries = build_manifest(packages | {str(large): "package0"}).entries
    (entry,) = (entry for entry in entries if entry.path == str(large))
    assert entry.size == 9000
    assert entry.sha256 == hashlib.sha256(large.read_bytes()[:6000]).hexdigest()


ENTRY = ManifestEntry("/a", 5000, "0" * 64, "p", 1, True)
VALID = Manifest(("x", "y"), (ENTRY,))


def test_parse_manifest_reads_written_manifest() -> None:
    assert parse_manifest(VALID.to_bytes(), "m") == VALID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        VALID.to_bytes().replace(b"files/v1", b"files/v9"),
        VALID.to_bytes().replace(b"5000", b'"5000"'),
        VALID.to_bytes().replace(b", 1, true", b", 2, true"),
        VALID.to_bytes().replace(b", 1, true", b", true, true"),
        VALID.to_bytes().replace(b", 1, true", b", 1"),
        json.dumps({"format": manifest_module.FORMAT, "classes": ["x", "y"], "files": []}).encode(),
        json.dumps({"format": manifest_module.FORMAT, "classes": ["x", "y"], "files": 3}).encode(),
        b"[" * 10_000,
    ],
)
def test_parse_manifest_of_damaged_file_raises_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"place/m .* Remove it") as caught:
        parse_manifest(data, "place/m")
    assert caught.value.field == "data"
