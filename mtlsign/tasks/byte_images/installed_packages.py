"""Files of installed packages, as the package managers list them: dpkg, and Python distributions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

DPKG_FOLDER = Path("/var/lib/dpkg")
#: Largest list of one package; the largest of Debian has about 2 MiB.
_MAX_LIST_BYTES = 64 * 1024 * 1024


def installed_files(dpkg_folder: Path = DPKG_FOLDER) -> dict[str, str]:
    """Return the package of each listed path. Without dpkg, Python packages alone.

    Files that dpkg lists need not exist; of Python packages, Python 3.12 and later list existing files alone.

    The package is the source package of dpkg or the name of the Python distribution, in lower case. Binary
    packages of one source, such as a library and its debug symbols, hold similar files and are one package.
    The compiled file of a listed Python source counts as listed, because installers do not list it.
    """
    packages: dict[str, str] = {}
    for paths, package in (*_dpkg_packages(dpkg_folder), *_python_packages(metadata.distributions())):
        for path in paths:
            packages.setdefault(path, package)
            if path.endswith(".py"):
                packages.setdefault(cache_from_source(path), package)
    return packages


def _dpkg_packages(folder: Path) -> Iterator[tuple[list[str], str]]:
    sources = _dpkg_sources(folder / "status")
    for file in sorted((folder / "info").glob("*.list")):
        name = file.name.removesuffix(".list").partition(":")[0]
        lines = _read(file).split(b"\n")
        paths = [os.path.normpath(os.fsdecode(line)) for line in lines if _is_absolute_path(line)]
        yield paths, sources.get(name, name).lower()


def _is_absolute_path(line: bytes) -> bool:
    return line.startswith(b"/") and b"\0" not in line


def _dpkg_sources(status: Path) -> dict[str, str]:
    """Return the source package of each package whose source has another name."""
    sources: dict[str, str] = {}
    package = ""
    for line in _read(status).decode("utf-8", "replace").split("\n"):
        field, _, value = line.partition(": ")
        if field == "Package":
            package = value.strip()
        elif field == "Source" and package:
            sources[package] = value.split(" ")[0].strip()
    return sources


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_LIST_BYTES)
    except OSError:
        return b""


def _python_packages(distributions: Iterable[metadata.Distribution]) -> Iterator[tuple[list[str], str]]:
    for distribution in distributions:
        name = re.sub(r"[-_.]+", "-", str(distribution.metadata["Name"])).lower()
        paths = [os.path.normpath(str(distribution.locate_file(file))) for file in distribution.files or ()]
        yield [path for path in paths if os.path.isabs(path) and "\0" not in path], name
