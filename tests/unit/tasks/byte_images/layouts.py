"""Generated files of several types, and small package databases that list them."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

MAGIC = {"so": b"\x7fELF", "gz": b"\x1f\x8b", "mo": b"\xde\x12\x04\x95", "a": b"!<arch>\n"}


def content(seed: int | str, size: int = 5000, start: bytes = b"") -> bytes:
    return start + random.Random(seed).randbytes(size - len(start))


def write_classes(root: Path, counts: dict[str, int], size: int = 2000) -> Path:
    """Write random files of classes below `root`/virusshare."""
    folder = root / "virusshare"
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"sample{i}").write_bytes(content(1000 * number + i, size))
    return folder


def write_packages(
    root: Path, packages: int = 10, files: int = 3, suffixes: tuple[str, ...] = ("so", "gz", "mo")
) -> dict[str, str]:
    """Write files of several types in each package; return the package of each path."""
    paths: dict[str, str] = {}
    for package in range(packages):
        folder = root / f"package{package}"
        folder.mkdir(parents=True)
        for i in range(files):
            for suffix in suffixes:
                path = folder / f"file{i}.{suffix}"
                path.write_bytes(content(f"{root.name}/{package}/{path.name}", 4100, MAGIC[suffix]))
                paths[str(path)] = f"package{package}"
    return paths


def write_dpkg(folder: Path, lists: dict[str, bytes], status: str = "") -> Path:
    """Write the lists and the status file of dpkg."""
    (folder / "info").mkdir(parents=True)
    for name, lines in lists.items():
        (folder / "info" / f"{name}.list").write_bytes(lines)
    (folder / "status").write_text(status, "utf-8")
    return folder


def write_distribution(folder: Path, name: str, files: list[str]) -> None:
    """Write the metadata of an installed Python distribution that lists `files`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), "utf-8")


def distributions_in(folder: Path) -> Callable[[], list[metadata.Distribution]]:
    """Return a replacement of `importlib.metadata.distributions` that lists those of a folder alone."""
    return lambda: list(metadata.Distribution.discover(path=[str(folder)]))
