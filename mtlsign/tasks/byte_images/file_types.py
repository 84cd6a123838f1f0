"""Classes of harmless files, decided by the name and the first bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath


@dataclass(frozen=True)
class FileType:
    """Class of files.

    Attributes:
        name: the class.
        matches_name: whether a path can belong to the class.
        magic: possible first bytes of its files; empty if any are possible.
    """

    name: str
    matches_name: Callable[[PurePath], bool]
    magic: tuple[bytes, ...] = ()


#: First bytes of any class; a file with them belongs to no class without magic.
_BINARY = (b"\x7fELF", b"\x1f\x8b", b"PK", b"\x89PNG", b"!<arch>\n", b"MZ")
_PROGRAM_FOLDERS = frozenset({"bin", "sbin", "libexec"})


def _with_suffix(*suffixes: str) -> Callable[[PurePath], bool]:
    return lambda path: path.suffix.lower() in suffixes


def _is_program_or_library(path: PurePath) -> bool:
    return (
        path.suffix in (".so", ".debug", ".o")
        or ".so." in path.name
        or (not path.suffix and not _PROGRAM_FOLDERS.isdisjoint(path.parts))
    )


#: Executables and shared objects are one class: position-independent executables are shared objects of ELF.
#: Zip archives are left out because their bytes resemble those of gzip. Perl, JSON and other texts are left
#: out because their means over areas resemble those of Python and C.
FILE_TYPES = (
    FileType("elf", _is_program_or_library, (b"\x7fELF",)),
    FileType("python bytecode", _with_suffix(".pyc")),
    FileType("python source", _with_suffix(".py")),
    FileType("c source", _with_suffix(".c", ".cc", ".cpp", ".h", ".hh", ".hpp", ".hxx", ".cuh")),
    FileType("gzip", _with_suffix(".gz", ".svgz"), (b"\x1f\x8b",)),
    FileType("gettext catalogue", _with_suffix(".mo", ".gmo"), (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde")),
    FileType("ar archive", _with_suffix(".a", ".deb"), (b"!<arch>\n",)),
)


def type_of_name(path: str) -> FileType | None:
    """Return the type that a path can have; None if it has none."""
    pure_path = PurePath(path)
    return next((kind for kind in FILE_TYPES if kind.matches_name(pure_path)), None)


def has_type(content: bytes, kind: FileType) -> bool:
    """Return whether the first bytes agree with the type."""
    return content.startswith(kind.magic) if kind.magic else not content.startswith(_BINARY)
