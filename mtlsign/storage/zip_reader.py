"""Bounded reader of untrusted ZIP files whose members are stored without compression.

`zipfile` makes an object for every entry of the central directory, so the directory's size is checked first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import BinaryIO

from mtlsign.errors import ArtifactError

MAX_MEMBERS = 2000
_MAX_ENTRY_BYTES = 256
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR64_BYTES = 22, 56, 20
_UTF8_NAME = 0x800


class DamagedZipError(ArtifactError):
    """A ZIP file is damaged, over a limit, or has features that the writer of this package never uses."""


class BoundedZip:
    """Members of a ZIP file, each checked against its size limit before it is read.

    Refused: comments, extra fields, encryption, compression, duplicate names, data before the first member.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        *,
        member_limit: Callable[[str], int | None],
        max_members: int = MAX_MEMBERS,
    ) -> None:
        """Read and check the central directory.

        Args:
            file: the ZIP, seekable; the caller closes it.
            size: its size in bytes.
            member_limit: most bytes of the member with a given name; None refuses the member.
            max_members: most members.

        Raises:
            DamagedZipError: the directory is not as described above.
            OSError: `file` cannot be read.
        """
        _check_directory(file, size, max_members * _MAX_ENTRY_BYTES)
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OverflowError):
            raise DamagedZipError("The file is not a readable ZIP.") from None
        infos = self._zip.infolist()
        if not 1 <= len(infos) <= max_members or min(info.header_offset for info in infos) != 0:
            raise DamagedZipError(f"The ZIP does not have 1 to {max_members} members from its first byte on.")
        if sum(info.file_size for info in infos) > size:
            raise DamagedZipError("The members of the ZIP overlap.")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            _check_member(info, member_limit(info.orig_filename))
            if info.filename in self._members:
                raise DamagedZipError(f"The ZIP holds {ascii(info.filename)[:80]} twice.")
            self._members[info.filename] = info

    @property
    def names(self) -> list[str]:
        """Names of all members, in the order of the directory."""
        return list(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Return the size of the member `name` in bytes. Raises `DamagedZipError` when it is missing."""
        return self._member(name).file_size

    def read(self, name: str) -> bytes:
        """Return the bytes of the member `name`; raise `DamagedZipError` when it is missing or damaged."""
        try:
            return self._zip.read(self._member(name))
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
            raise DamagedZipError(f"The member {name} of the ZIP is damaged.") from None

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise DamagedZipError(f"The ZIP lacks the member {ascii(name)[:80]}.")
        return self._members[name]


def _check_member(info: zipfile.ZipInfo, limit: int | None) -> None:
    if limit is None or info.filename != info.orig_filename:
        raise DamagedZipError(f"The ZIP holds the unexpected member {ascii(info.orig_filename)[:80]}.")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise DamagedZipError("The ZIP holds a compressed member.")
    if info.flag_bits & ~_UTF8_NAME or info.extra or info.comment:
        raise DamagedZipError("The ZIP holds a member with encryption, extra fields or a comment.")
    if info.file_size > limit:
        raise DamagedZipError(f"The member {ascii(info.filename)[:80]} is over {limit} bytes.")


def _check_directory(file: BinaryIO, size: int, limit: int) -> None:
    """Check the size of the central directory without parsing it."""
    tail_bytes = _END_BYTES + _LOCATOR64_BYTES + _END64_BYTES
    file.seek(max(0, size - tail_bytes))
    tail = file.read(tail_bytes)
    end = tail[-_END_BYTES:]
    if len(end) != _END_BYTES or not end.startswith(_END) or end[20:] != b"\0\0":
        raise DamagedZipError("The file is not a ZIP without a comment.")
    directory_bytes = int.from_bytes(end[12:16], "little")
    locator = tail[-_END_BYTES - _LOCATOR64_BYTES : -_END_BYTES]
    if locator.startswith(_LOCATOR64):
        end64 = tail[:_END64_BYTES]
        misplaced = int.from_bytes(locator[8:16], "little") != size - tail_bytes
        if len(tail) != tail_bytes or not end64.startswith(_END64) or misplaced:
            raise DamagedZipError("The ZIP has a damaged ZIP64 directory.")
        directory_bytes = int.from_bytes(end64[40:48], "little")
    if directory_bytes > limit:
        raise DamagedZipError(f"The directory of the ZIP is over {limit} bytes.")
