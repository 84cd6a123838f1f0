"""Manifest of harmless files: path, size, SHA-256, package, class and part of every file.

The choice follows from the installed packages alone. Of a class, the packages give one file in turn, each its
files in the order of SHA-256 of the path, until there are `max_files`. One package gives at most a tenth of
them. Equal contents count once. A class with fewer than `MIN_FILES` files is dropped.

The parts are divided by package, so that similar files of one package never lie in both: packages go to the
test part in the order of SHA-256 of their name, as long as no class has more than `TEST` of its files there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from mtlsign.errors import DataError
from mtlsign.storage.json_io import parse_bounded_json
from mtlsign.tasks.byte_images.file_types import FILE_TYPES, has_type, type_of_name
from mtlsign.tasks.byte_images.malimg import MAX_BYTES, read_regular_file

FORMAT = "mtlsign/files/v1"
#: Most files of a class.
MAX_FILES = 1000
#: Smallest number of files of a class, and of its files in the test part.
MIN_FILES, MIN_TEST_FILES = 200, 20
#: Smallest file: an image of a smaller one is made of fewer pixels than it has.
MIN_BYTES = 4096
TEST = 0.2
#: Largest manifest in bytes.
MANIFEST_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class ManifestEntry:
    """File of a data set.

    Attributes:
        path: absolute path.
        size: size in bytes.
        sha256: SHA-256 in hexadecimal of its first `MAX_BYTES` bytes.
        package: the package that installed it.
        label: number of its class.
        in_test: whether it belongs to the test part.
    """

    path: str
    size: int
    sha256: str
    package: str
    label: int
    in_test: bool = False


@dataclass(frozen=True)
class Manifest:
    """Files of a data set.

    Attributes:
        classes: names of the classes, in the order of their numbers.
        entries: the files.
    """

    classes: tuple[str, ...]
    entries: tuple[ManifestEntry, ...]

    def to_bytes(self) -> bytes:
        """Return the file of the manifest, whose SHA-256 identifies the data set."""
        lines = ",\n".join(json.dumps(list(astuple(entry))) for entry in self.entries)
        head = json.dumps({"format": FORMAT, "classes": list(self.classes)})[:-1]
        return f'{head}, "files": [\n{lines}\n]}}\n'.encode()


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read the file of a manifest.

    Args:
        content: the file, at most `MANIFEST_LIMIT` bytes.
        where: its path, for messages.

    Raises:
        DataError: the file is damaged.
    """
    try:
        fields = parse_bounded_json(content) if len(content) <= MANIFEST_LIMIT else {}
        if fields["format"] != FORMAT:
            raise ValueError("unknown format")
        classes = tuple(_checked(name, str) for name in fields["classes"])
        manifest = Manifest(classes, tuple(_parse_entry(row, len(classes)) for row in fields["files"]))
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{where} is no manifest of files. Remove it; the next run writes another.", field="data"
        ) from None
    if not manifest.entries or len(classes) < 2:
        raise DataError(f"{where} has too few files. Remove it; the next run writes another.", field="data")
    return manifest


def _parse_entry(row: Any, classes: int) -> ManifestEntry:
    path, size, sha256, package, label, in_test = row
    entry = ManifestEntry(
        *(_checked(path, str), _checked(size, int), _checked(sha256, str), _checked(package, str)),
        *(_checked(label, int), _checked(in_test, bool)),
    )
    if not 0 <= entry.label < classes:
        raise ValueError("unknown class")
    return entry


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value


def build_manifest(packages: Mapping[str, str], max_files: int = MAX_FILES) -> Manifest:
    """Choose files of installed packages, read them, and divide them by package.

    Args:
        packages: package of each path.
        max_files: most files of a class.

    Raises:
        DataError: fewer than two classes have enough files.
    """
    candidates = _candidates(packages)
    digests: set[str] = set()
    entries: list[ManifestEntry] = []
    for label, kind in enumerate(FILE_TYPES):
        chosen = 0
        for path, package in _in_turn(candidates[kind.name], max_files // 10):
            content = read_regular_file(path)
            if content is None or len(content) < MIN_BYTES or not has_type(content, kind):
                continue
            digest = hashlib.sha256(content).hexdigest()
            if digest not in digests:
                digests.add(digest)
                size = len(content) if len(content) < MAX_BYTES else os.stat(path).st_size
                entries.append(ManifestEntry(path, size, digest, package, label))
                chosen += 1
            if chosen == max_files:
                break
    return _without_small_classes(entries, packages_of_test_part(entries))


def _candidates(packages: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """Return the paths of regular files of at least `MIN_BYTES`, by class and package."""
    candidates: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path, package in packages.items():
        kind = type_of_name(path)
        if kind is None:
            continue
        try:
            status = os.lstat(path)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size >= MIN_BYTES:
            candidates[kind.name][package].append(path)
    return candidates


def _in_turn(paths_by_package: Mapping[str, list[str]], per_package: int) -> Iterator[tuple[str, str]]:
    """Yield one path of every package in turn, at most `per_package` of each."""
    ranked = []
    for package, paths in paths_by_package.items():
        order = sorted(paths, key=_text_digest)[:per_package]
        ranked += [(rank, _text_digest(path), path, package) for rank, path in enumerate(order)]
    for _, _, path, package in sorted(ranked):
        yield path, package


def _text_digest(text: str) -> bytes:
    return hashlib.sha256(os.fsencode(text)).digest()


def packages_of_test_part(entries: Sequence[ManifestEntry]) -> set[str]:
    """Return the packages of the test part; see the module's docstring."""
    totals = Counter(entry.label for entry in entries)
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for entry in entries:
        counts[entry.package][entry.label] += 1
    chosen: set[str] = set()
    in_test: Counter[int] = Counter()
    for package in sorted(counts, key=_text_digest):
        if all(in_test[label] + count <= TEST * totals[label] for label, count in counts[package].items()):
            chosen.add(package)
            in_test += counts[package]
    return chosen


def _without_small_classes(entries: Sequence[ManifestEntry], in_test: set[str]) -> Manifest:
    """Return the manifest of the classes that have enough files in both parts."""
    totals = Counter(entry.label for entry in entries)
    tests = Counter(entry.label for entry in entries if entry.package in in_test)
    labels = [
        label
        for label in range(len(FILE_TYPES))
        if totals[label] >= MIN_FILES and tests[label] >= MIN_TEST_FILES
    ]
    dropped = [f"{kind.name} ({totals[i]})" for i, kind in enumerate(FILE_TYPES) if i not in labels]
    if len(labels) < 2:
        raise DataError(
            f"Only {len(labels)} classes have {MIN_FILES} files of installed packages. Use a machine with "
            "more packages, or another task.",
            field="task",
        )
    if dropped:
        warnings.warn(
            f"The task files has no class {', '.join(dropped)}: a class needs {MIN_FILES} files, and "
            f"{MIN_TEST_FILES} of them in packages of the test part.",
            stacklevel=2,
        )
    numbers = {label: number for number, label in enumerate(labels)}
    return Manifest(
        tuple(FILE_TYPES[label].name for label in labels),
        tuple(
            ManifestEntry(e.path, e.size, e.sha256, e.package, numbers[e.label], e.package in in_test)
            for e in entries
            if e.label in numbers
        ),
    )
