"""Manifest folders: a folder is committed if and only if its `manifest.json` exists (docs/decisions/0005).

The manifest is written last and never replaced. It lists the name, size and SHA-256 of every file:

    {"files":[{"name":"config.json","sha256":64 hex,"size":123},…by name…],"format":"mtlsign/folder/v1"}

A crash at any point therefore leaves a committed folder or an uncommitted one, which a second run completes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtlsign.errors import (
    ArtifactError,
    KeyMaterialError,
    MissingArtifactError,
    OldArtifactError,
    OldVersionError,
    TooLargeError,
)
from mtlsign.storage.base import Storage
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields
from mtlsign.storage.versions import refuse_version_0

FORMAT = "mtlsign/folder/v1"
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**20
FILES_LIMIT = 1000
GIB = 2**30

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """File of a folder: its name, its size in bytes and its SHA-256 (64 hex)."""

    name: str
    size: int
    sha256: str


def manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    """Return the manifest of `files`, whose names are flat: letters, digits, `.`, `_` and `-`.

    Raises:
        ArtifactError: a name is not allowed, or there are too few or too many files.
    """
    entries = []
    for name in sorted(files):
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(
                f"{name[:80]!r} cannot name a file of a folder. Use letters, digits, '.', '_' and '-'."
            )
        data = files[name]
        entries.append({"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
    if not 1 <= len(entries) <= FILES_LIMIT:
        raise ArtifactError(
            f"A folder has 1 to {FILES_LIMIT} files, not {len(entries)}. Use another number of files."
        )
    text = json.dumps({"files": entries, "format": FORMAT}, sort_keys=True, separators=(",", ":"))
    return text.encode() + b"\n"


def parse_manifest(data: bytes) -> dict[str, Entry]:
    """Parse an untrusted manifest; return its entries by name.

    Raises:
        OldArtifactError: `data` has version 0 of the format.
        ArtifactError: `data` does not have exactly the format above.
    """
    try:
        value = parse_strict_json(data, limit=MANIFEST_LIMIT, where=MANIFEST, max_brackets=FILES_LIMIT + 2)
        refuse_version_0(value, "format", where=MANIFEST, fix="Embed the watermark and publish again.")
        fields = require_fields(value, MANIFEST, "files", "format")
        files = fields["files"]
        if fields["format"] != FORMAT or not isinstance(files, list) or not 1 <= len(files) <= FILES_LIMIT:
            raise_invalid(MANIFEST, "The format or the list of files is wrong")
        entries: dict[str, Entry] = {}
        for file in files:
            entry = _parse_entry(file)
            if entry.name in entries:
                raise_invalid(MANIFEST, "A file is listed twice")
            entries[entry.name] = entry
    except OldVersionError as error:
        raise OldArtifactError(error.detail, field=error.field) from None
    except KeyMaterialError:
        raise ArtifactError(
            f"{MANIFEST} does not have the format {FORMAT}. Fetch the folder again."
        ) from None
    return entries


def _parse_entry(value: object) -> Entry:
    fields = require_fields(value, MANIFEST, "name", "sha256", "size")
    name, size, digest = fields["name"], fields["size"], fields["sha256"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == MANIFEST:
        raise_invalid(MANIFEST, "A file has a name that is not allowed")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise_invalid(MANIFEST, "A file has a size that is not a whole number")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise_invalid(MANIFEST, "A file has a digest that is not 64 hexadecimal digits")
    return Entry(name, size, digest)


def write_manifest_folder(
    storage: Storage, files: Mapping[str, bytes], *, replace_uncommitted: bool = True
) -> None:
    """Write `files` as the folder `storage`, all or none. Nothing changes if the same files exist already.

    Args:
        storage: the folder.
        files: content by name.
        replace_uncommitted: replace other files of an uncommitted folder, which an interrupted writer left.
            Pass False where several writers may use the folder at once: then no file is ever replaced, so
            that a writer cannot damage a folder that another one commits.

    Raises:
        ArtifactError: the folder is committed with other files, or holds another file that is not replaced.
        StorageError: the storage cannot be written.
    """
    manifest = manifest_bytes(files)
    if not _already_written(storage, manifest):
        for name in sorted(files):
            _write_file(storage, name, files[name], replace_uncommitted)
        if not storage.write(MANIFEST, manifest, if_absent=True):
            _already_written(storage, manifest)


def _write_file(storage: Storage, name: str, data: bytes, replace: bool) -> None:
    if storage.write(name, data, if_absent=True) or _has_content(storage, name, data):
        return
    if not replace or storage.exists(MANIFEST):
        raise ArtifactError(
            f"{storage.uri} already holds another {name}. Delete that folder if no other job is writing it, "
            "or choose another location."
        )
    storage.write(name, data)


def _has_content(storage: Storage, name: str, data: bytes) -> bool:
    try:
        return storage.read(name, len(data)) == data
    except TooLargeError:
        return False


def _already_written(storage: Storage, manifest: bytes) -> bool:
    if not storage.exists(MANIFEST):
        return False
    if storage.read(MANIFEST, MANIFEST_LIMIT) != manifest:
        raise ArtifactError(f"{storage.uri} already holds other files. Choose another location or name.")
    return True


def read_manifest(storage: Storage) -> dict[str, Entry]:
    """Return the entries of the folder `storage` by name.

    Raises:
        MissingArtifactError: there is no such local folder.
        ArtifactError: the folder is not committed, or has a damaged manifest.
    """
    if not storage.exists(MANIFEST):
        if "://" not in storage.uri and not Path(storage.uri).exists():
            raise MissingArtifactError(f"{storage.uri} does not exist. Correct the path.")
        raise ArtifactError(
            f"{storage.uri} is not a committed folder: it has no {MANIFEST}. "
            "Pass the right folder, or the file itself."
        )
    return parse_manifest(storage.read(MANIFEST, MANIFEST_LIMIT))


def read_manifest_folder(
    storage: Storage,
    *,
    file_limit: int = 2 * GIB,
    total_limit: int = 4 * GIB,
    names: Collection[str] | None = None,
) -> dict[str, bytes]:
    """Read the files of the folder `storage`, each checked against its size and digest in the manifest.

    Args:
        storage: the folder.
        file_limit: most bytes of one file.
        total_limit: most bytes of all files that are read.
        names: the only files to read, all of them required; None reads every listed file.

    Returns:
        The content of each file by name.

    Raises:
        ArtifactError: the folder is missing, damaged or over a limit.
        StorageError: the storage cannot be read.
    """
    entries = read_manifest(storage)
    missing = sorted(set(names or ()) - entries.keys())
    if missing:
        raise ArtifactError(f"{storage.uri} lacks {missing[0]}. Pass a folder of the right kind.")
    selected = [entry for name, entry in sorted(entries.items()) if names is None or name in names]
    if sum(e.size for e in selected) > total_limit or any(e.size > file_limit for e in selected):
        raise ArtifactError(
            f"{storage.uri} is over its limit of {file_limit} bytes per file. Pass the right folder."
        )
    files = {}
    for entry in selected:
        files[entry.name] = _read_entry(storage, entry)
    return files


def _read_entry(storage: Storage, entry: Entry) -> bytes:
    """Return a file of a folder. Raises `ArtifactError` if it is not the one that the manifest lists."""
    try:
        data = storage.read(entry.name, entry.size)
    except TooLargeError:  # the file has grown; its listed size is no limit that the caller could raise
        data = b""
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ArtifactError(f"{storage.uri}: {entry.name} does not match {MANIFEST}. Fetch the folder again.")
    return data
