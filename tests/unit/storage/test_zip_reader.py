"""Tests of the bounded ZIP reader."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.storage.zip_reader import BoundedZip, DamagedZipError

MEMBERS = {"a": b"alpha", "blobs/b": b"", "c": b"gamma"}


def _write(
    members: dict[str, bytes],
    change: Callable[[zipfile.ZipFile], None] = lambda _: None,
    *,
    zip64: bool = False,
) -> bytes:
    buffer = io.BytesIO()
    limit = 0 if zip64 else zipfile.ZIP_FILECOUNT_LIMIT
    with mock.patch("zipfile.ZIP_FILECOUNT_LIMIT", limit), zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data)
        change(file)
    return buffer.getvalue()


def _open(data: bytes, *, limit: int | None = 100, max_members: int = 10) -> BoundedZip:
    return BoundedZip(io.BytesIO(data), len(data), member_limit=lambda _: limit, max_members=max_members)


@pytest.mark.parametrize("zip64", [False, True])
def test_bounded_zip_returns_written_members(zip64: bool) -> None:
    data = _write(MEMBERS, zip64=zip64)
    assert (b"PK\x06\x06" in data) == zip64
    file = _open(data)
    assert file.names == list(MEMBERS) and "a" in file and "missing" not in file
    assert {name: file.read(name) for name in file.names} == MEMBERS and file.size("c") == 5


def test_bounded_zip_read_of_missing_member_raises() -> None:
    with pytest.raises(DamagedZipError, match="lacks the member 'missing'"):
        _open(_write(MEMBERS)).read("missing")


def test_bounded_zip_read_of_changed_member_raises() -> None:
    data = _write(MEMBERS).replace(b"alpha", b"alphA")
    with pytest.raises(DamagedZipError, match="member a of the ZIP is damaged"):
        _open(data).read("a")


def _info(name: str, **changes: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for field, value in changes.items():
        setattr(info, field, value)
    return info


def _comment(file: zipfile.ZipFile) -> None:
    file.comment = b"note"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not a ZIP"),
        (b"PK\x05\x06" + bytes(18), "1 to 10 members"),
        (b"prefix" + _write(MEMBERS), "from its first byte"),
        (_write(MEMBERS) + b"x", "without a comment"),
        (_write(MEMBERS, _comment), "without a comment"),
        (_write({str(i): b"" for i in range(11)}), "1 to 10 members"),
        (_write({"a": b"x" * 101}), "over 100 bytes"),
        (
            _write({}, lambda f: f.writestr(_info("a", compress_type=zipfile.ZIP_DEFLATED), b"x" * 50)),
            "compressed",
        ),
        (_write({}, lambda f: f.writestr(_info("a", extra=b"\x01\x00\x00\x00"), b"x")), "extra fields"),
        (_write({}, lambda f: f.writestr(_info("a", comment=b"note"), b"x")), "a comment"),
        (_write({"aXb": b""}).replace(b"aXb", b"a\0b"), "unexpected member"),
    ],
)
def test_bounded_zip_unexpected_features_raise(data: bytes, problem: str) -> None:
    with pytest.raises(DamagedZipError, match=problem):
        _open(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bounded_zip_duplicate_name_raises() -> None:
    with pytest.raises(DamagedZipError, match="twice"):
        _open(_write({"a": b"1"}, lambda file: file.writestr(_info("a"), b"2")))


def test_bounded_zip_member_without_limit_raises() -> None:
    with pytest.raises(DamagedZipError, match="unexpected member 'a'"):
        _open(_write(MEMBERS), limit=None)


@pytest.mark.parametrize("zip64", [False, True])
def test_bounded_zip_large_directory_is_refused_without_parsing(
    monkeypatch: pytest.MonkeyPatch, zip64: bool
) -> None:
    data = _write({f"{i:06}": b"" for i in range(2000)}, zip64=zip64)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the directory was parsed"))
    with pytest.raises(DamagedZipError, match="directory of the ZIP is over"):
        _open(data)


def test_bounded_zip_misplaced_zip64_directory_raises() -> None:
    data = _write(MEMBERS, zip64=True)
    locator = data.index(b"PK\x06\x07")
    moved = data[: locator + 8] + bytes(8) + data[locator + 16 :]
    with pytest.raises(DamagedZipError, match="damaged ZIP64"):
        _open(moved)


@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400))
def test_bounded_zip_of_corrupted_bytes_raises_only_damaged_zip_error(at: int, value: int, cut: int) -> None:
    data = bytearray(_write(MEMBERS))
    data[at % len(data)] = value
    data = data[: len(data) - cut % 60]
    try:
        file = _open(bytes(data))
        for name in file.names:
            file.read(name)
    except DamagedZipError as error:
        assert len(str(error).splitlines()) == 1
