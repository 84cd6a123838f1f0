from __future__ import annotations

import pytest

from mtlsign.tasks.byte_images.file_types import FILE_TYPES, has_type, type_of_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/lib/libc.so.6", "elf"),
        ("/usr/lib/module.cpython-311.so", "elf"),
        ("/usr/bin/ls", "elf"),
        ("/usr/bin/tool.py", "python source"),
        ("/usr/lib/m.pyc", "python bytecode"),
        ("/usr/include/STDIO.H", "c source"),
        ("/usr/share/man/a.1.gz", "gzip"),
        ("/usr/share/locale/de/a.mo", "gettext catalogue"),
        ("/usr/lib/libc.a", "ar archive"),
    ],
)
def test_type_of_name_returns_type(path: str, name: str) -> None:
    kind = type_of_name(path)
    assert kind is not None and kind.name == name


@pytest.mark.parametrize(
    "path", ["/usr/share/doc/copyright", "/usr/share/a.zip", "/usr/share/a.pl", "/usr/share/a.json", "/"]
)
def test_type_of_name_of_other_files_returns_none(path: str) -> None:
    assert type_of_name(path) is None


def test_has_type_compares_first_bytes() -> None:
    kinds = {kind.name: kind for kind in FILE_TYPES}
    assert has_type(b"\x7fELF\2\1", kinds["elf"]) and not has_type(b"#!/bin/sh", kinds["elf"])
    assert has_type(b"import os", kinds["python source"])
    assert not has_type(b"\x1f\x8b\b", kinds["c source"])
