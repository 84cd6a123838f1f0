"""Storage interface with two implementations: a local folder and an S3 prefix.

An S3 location may carry `?endpoint_override=HOST:PORT&scheme=http&region=…`. The endpoint is taken from
there, otherwise from the `endpoint` setting, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. `Storage.uri` always
states it, so that boto3 and the pyarrow of Ray use the same server. Credentials come from the environment
only (the standard AWS chain): a location with credentials is refused, and none are stored, printed or
pickled.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod

from mtlsign.errors import StorageError, TooLargeError

LIST_LIMIT = 100_000
"""Most names that one `list` or `delete` handles."""

TEMPORARY_PREFIX = ".tmp-"
_NAME_BYTES = 900

Names = list[str]


class Storage(ABC):
    """Folder of named files. Names are relative, `/`-separated, and never leave the folder."""

    uri: str
    """Absolute local path, or full S3 location with its endpoint (never credentials)."""

    def ray_path(self) -> str:
        """Return the `storage_path` of Ray's RunConfig for this folder on this server."""
        return self.uri

    @abstractmethod
    def child(self, name: str, *, private: bool = False) -> Storage:
        """Return the folder `name` below this one; nothing is created.

        Args:
            name: name below this folder.
            private: create local folders with mode 0700 and files with mode 0600, also further below. The
                access to S3 is a matter of the bucket's policy.
        """

    @abstractmethod
    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a file atomically: a reader sees the old content or the new, never a part.

        Args:
            name: name below this folder.
            data: the content.
            if_absent: do not replace an existing file. Among racing writers exactly one succeeds. A writer
                whose answer was lost on the network gets False although it succeeded: compare the content.

        Returns:
            False if `if_absent` and the file exists already, otherwise True.

        Raises:
            StorageError: the storage is unreachable, full, or refuses access.
        """

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file; its size is checked before anything is read.

        Args:
            name: name below this folder.
            limit: most bytes.

        Raises:
            ArtifactError: the file is missing, not a regular file, or has more than `limit` bytes.
            StorageError: the storage is unreachable or refuses access.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return True if `name` is a file (not a folder)."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete the file or folder `name`. Manifests go first, so no committed folder is ever incomplete."""

    def check_writable(self) -> None:
        """Write, rewrite and delete a test file.

        The storage must honour `if_absent`, because manifests rely on it.

        Raises:
            StorageError: the storage is not writable, replaces an existing file, or does not answer within
                about ten seconds.
        """
        name = f"mtlsign-probe-{secrets.token_hex(8)}"
        first = self.write(name, b"first", if_absent=True)
        try:
            second = self.write(name, b"second", if_absent=True)
            if not first or second or self.read(name, 16) != b"first":
                raise StorageError(
                    f"{self.uri} replaces a file that must be written only if it is absent. "
                    "Use a server that honours If-None-Match (AWS S3, SeaweedFS, Ceph) or a local folder.",
                    field="storage",
                )
        finally:
            self.delete(name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abstractmethod
    def list(self, prefix: str = "") -> Names:
        """Return the sorted names of all files in the folder `prefix` (default: all files), at any depth."""


def validate_name(name: str) -> str:
    """Return `name` if it is safe below a folder: relative, without `.`, `..`, backslash, control characters.

    Raises:
        StorageError: the name is not safe.
    """
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") or part.startswith(TEMPORARY_PREFIX) for part in parts)
    if unsafe or "\\" in name or not name.isprintable() or len(name.encode("utf-8", "replace")) > _NAME_BYTES:
        raise StorageError(f"{name[:80]!r} is not a safe file name. Use plain relative names without '..'.")
    return name


def check_size(location: str, size: int, limit: int) -> None:
    """Raise `TooLargeError` if `size` bytes at `location` are more than `limit`."""
    if size > limit:
        raise TooLargeError(
            f"{location} has more than the {limit} bytes allowed. Pass the right file or raise the limit."
        )
