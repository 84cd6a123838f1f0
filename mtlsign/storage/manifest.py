"""The folder rule: a folder exists if and only if its `manifest.json` does (design, "How data flows").

The manifest is written last and only if new; it lists every file's name, size and SHA-256:

    {"files":[{"name":"config.json","sha256":64 hex,"size":123},…by name…],"format":"mtlsign/folder/v0"}

So a crash at any point leaves the whole folder or none, and running again completes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mtlsign.errors import ArtifactError
from mtlsign.storage.base import Storage

FORMAT = "mtlsign/folder/v0"
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**20
FILES_LIMIT = 1000
GIB = 2**30

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One file of a folder: its name, its bytes' count and their SHA-256 (64 hex)."""

    name: str
    size: int
    sha256: str


def manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    """The one manifest of these files (names flat: letters, digits, `.`, `_`, `-`)."""
    entries = []
    for name in sorted(files):
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(
                f"{name[:80]!r} cannot name a folder's file; use letters, digits, '.', '_', '-'"
            )
        data = files[name]
        entries.append({"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    if not 1 <= len(entries) <= FILES_LIMIT:
        raise ArtifactError(f"a folder holds 1 to {FILES_LIMIT} files, not {len(entries)}; regroup them")
    text = json.dumps({"files": entries, "format": FORMAT}, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def parse_manifest(data: bytes) -> dict[str, Entry]:
    """The entries, by name, of a manifest from anywhere.

    Raises: ArtifactError for anything but exactly the format above.
    """
    try:
        found = _strict_json(data)
        if not isinstance(found, dict) or found.keys() != {"files", "format"} or found["format"] != FORMAT:
            raise ValueError
        if not isinstance(found["files"], list) or not 1 <= len(found["files"]) <= FILES_LIMIT:
            raise ValueError
        entries = {}
        for item in found["files"]:
            if not isinstance(item, dict) or item.keys() != {"name", "sha256", "size"}:
                raise ValueError
            name, size, digest = item["name"], item["size"], item["sha256"]
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name == MANIFEST or name in entries:
                raise ValueError
            if type(size) is not int or not 0 <= size < 2**63:
                raise ValueError
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise ValueError
            entries[name] = Entry(name, size, digest)
    except ValueError:
        raise ArtifactError(f"{MANIFEST} is no manifest of {FORMAT}; fetch the folder again") from None
    return entries


def write_manifest_folder(storage: Storage, files: Mapping[str, bytes]) -> None:
    """Write `files` as the folder `storage`, all or nothing. Again with the same files: no change.

    Raises: ArtifactError when another folder is already there; StorageError when the place fails.
    """
    manifest = manifest_bytes(files)
    if not _already_written(storage, manifest):
        for name in sorted(files):
            storage.write(name, files[name])
        if not storage.write(MANIFEST, manifest, if_absent=True):
            _already_written(storage, manifest)


def _already_written(storage: Storage, manifest: bytes) -> bool:
    if not storage.exists(MANIFEST):
        return False
    if storage.read(MANIFEST, MANIFEST_LIMIT) != manifest:
        raise ArtifactError(f"{storage.uri} already holds something else; choose another place or name")
    return True


def read_manifest(storage: Storage) -> dict[str, Entry]:
    """The entries of the folder `storage`.

    Raises: ArtifactError when there is no such folder, or a half-written or damaged one.
    """
    if not storage.exists(MANIFEST):
        raise ArtifactError(
            f"{storage.uri} is no complete folder (no {MANIFEST}); give the right one, or the file itself"
        )
    return parse_manifest(storage.read(MANIFEST, MANIFEST_LIMIT))


def read_manifest_folder(
    storage: Storage,
    *,
    file_limit: int = 2 * GIB,
    total_limit: int = 4 * GIB,
    names: Collection[str] | None = None,
) -> dict[str, bytes]:
    """The files of the folder `storage` by name, each checked against size and digest in the manifest.

    Args:
        storage: the folder.
        file_limit: most bytes of one file.
        total_limit: most bytes of all files read.
        names: read (and demand) only these; default: all that the manifest lists.

    Raises: ArtifactError for a missing, damaged or too large folder; StorageError when the place fails.
    """
    entries = read_manifest(storage)
    missing = sorted(set(names or ()) - entries.keys())
    if missing:
        raise ArtifactError(f"{storage.uri} lacks {missing[0]}; give a folder of the right kind")
    wanted = [entry for name, entry in sorted(entries.items()) if names is None or name in names]
    if sum(entry.size for entry in wanted) > total_limit or any(entry.size > file_limit for entry in wanted):
        raise ArtifactError(
            f"{storage.uri} is over its limit of {file_limit} bytes a file; give the right folder"
        )
    files = {}
    for entry in wanted:
        data = storage.read(entry.name, entry.size)
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ArtifactError(
                f"{storage.uri}: {entry.name} is not what {MANIFEST} says; fetch the folder again"
            )
        files[entry.name] = data
    return files


def _strict_json(data: bytes) -> Any:
    """JSON without floats, NaN or repeated fields.

    Raises: ValueError for anything else, however deep or long.
    """
    try:
        return json.loads(
            data.decode("utf-8"), parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_no_repeats
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(text: str) -> NoReturn:
    raise ValueError("a number that is no integer")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a repeated field")
    return found
