from __future__ import annotations

import os
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from mtlsign.tasks.byte_images.installed_packages import installed_files
from tests.unit.tasks.byte_images.layouts import distributions_in, write_distribution, write_dpkg

STATUS = """Package: libc6
Source: glibc (2.36-9)
Description: a library
 Source: none

Package: zlib
Version: 1
"""


@pytest.fixture(autouse=True)
def no_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", distributions_in(tmp_path / "site"))


def test_installed_files_names_source_packages(tmp_path: Path) -> None:
    lists = {"libc6:amd64": b"/.\n/lib\n/lib/a.so\n", "zlib": b"/lib/z.so\n/lib/a.so\n", "other": b"/o\n"}
    files = installed_files(write_dpkg(tmp_path / "dpkg", lists, STATUS))
    assert files["/lib/a.so"] == "glibc" and files["/lib/z.so"] == "zlib" and files["/o"] == "other"


def test_installed_files_ignores_hostile_lines(tmp_path: Path) -> None:
    lists = {"a": b"relative/x\n../y\n/nul\0byte\n/a/../b\n/caf\xe9\n\n/spa ce"}
    files = installed_files(write_dpkg(tmp_path / "dpkg", lists))
    assert sorted(map(os.fsencode, files)) == [b"/b", b"/caf\xe9", b"/spa ce"]


def test_installed_files_lists_python_distributions_and_compiled_files(tmp_path: Path) -> None:
    write_distribution(tmp_path / "site", "My_Package", ["my/module.py", "../bin/tool"])
    for name in ("site/my/module.py", "bin/tool"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = installed_files(tmp_path / "missing")
    module = str(tmp_path / "site" / "my" / "module.py")
    assert files[module] == files[cache_from_source(module)] == "my-package"
    assert files[str(tmp_path / "bin" / "tool")] == "my-package"
