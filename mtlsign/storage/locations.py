"""mtlsign.storage.locations."""

from __future__ import annotations

import os
from pathlib import Path

from mtlsign.errors import StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.local import LocalStorage


def open_storage(uri: str, *, endpoint: str | None = None) -> Storage:
    """The folder at `uri`: a local path (`~` works) or `s3://bucket[/prefix][?options]`. Contacts nothing.

    Args:
        uri: where.
        endpoint: an S3 server other than AWS, `http://HOST:PORT`; no effect on a local path.

    Raises: StorageError for another scheme, credentials, unknown options, or two endpoints that disagree.
    """
    if not uri or "\0" in uri:
        raise StorageError("is empty; give a folder or s3://bucket/prefix", field="storage")
    if not uri.startswith("s3:"):
        if "://" in uri:
            raise StorageError(
                "knows no such scheme; give a local folder or s3://bucket/prefix", field="storage"
            )
        return LocalStorage(Path(os.path.abspath(os.path.expanduser(uri))))
    from mtlsign.storage.s3 import open_s3

    return open_s3(uri, endpoint)


def open_file(location: str, *, endpoint: str | None = None) -> tuple[Storage, str]:
    """The folder and the name of one file, from its local path or its `s3://…` location.

    Raises: StorageError as `open_storage`, or when `location` names no file.
    """
    path, mark, query = location.partition("?") if location.startswith("s3:") else (location, "", "")
    parent, _, name = path.rpartition("/")
    if not name or parent in ("s3:", "s3:/"):
        raise StorageError(f"{path or 'an empty location'} names no file; give the file's full location")
    folder = parent or ("/" if path.startswith("/") else ".")
    return open_storage(folder + mark + query, endpoint=endpoint), name
