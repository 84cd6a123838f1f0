"""Locations: local paths and `s3://bucket/prefix?options`, opened without contacting a server."""

from __future__ import annotations

import os
from pathlib import Path

from mtlsign.errors import StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.local import LocalStorage


def open_storage(uri: str, *, endpoint: str | None = None) -> Storage:
    """Return the storage at `uri`. No server is contacted.

    Args:
        uri: a local path (`~` works) or `s3://bucket[/prefix][?options]`.
        endpoint: an S3 server other than AWS, `http://HOST:PORT`; without effect on a local path.

    Raises:
        StorageError: the scheme or an option is unknown, `uri` holds credentials, or two endpoints disagree.
    """
    if not uri or "\0" in uri:
        raise StorageError("The location is empty. Pass a folder or s3://bucket/prefix.", field="storage")
    if not uri.startswith("s3:"):
        if "://" in uri:
            raise StorageError(
                "The scheme of the location is unknown. Pass a local folder or s3://bucket/prefix.",
                field="storage",
            )
        return LocalStorage(Path(os.path.abspath(os.path.expanduser(uri))))
    from mtlsign.storage.s3 import open_s3

    return open_s3(uri, endpoint)


def open_file(location: str, *, endpoint: str | None = None) -> tuple[Storage, str]:
    """Return the folder and the name of one file from its local path or its `s3://…` location.

    Raises:
        StorageError: as for `open_storage`, or `location` names no file.
    """
    path, mark, query = location.partition("?") if location.startswith("s3:") else (location, "", "")
    parent, _, name = path.rpartition("/")
    if not name or parent in ("s3:", "s3:/"):
        raise StorageError(
            f"{path or 'An empty location'} does not name a file. Pass the full location of the file."
        )
    folder = parent or ("/" if path.startswith("/") else ".")
    return open_storage(folder + mark + query, endpoint=endpoint), name


def path_of(location: str) -> str:
    """Return `location` without the options of an S3 location."""
    return location.partition("?")[0] if location.startswith("s3:") else location


def has_suffix(location: str, suffix: str) -> bool:
    """Return True if the path of `location` ends with `suffix`, as that of a single file does."""
    return path_of(location).endswith(suffix)
