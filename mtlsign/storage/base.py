"""One door to where things are written: a local folder or `s3://bucket/prefix` (design decision 10).

An S3 location may carry `?endpoint_override=HOST:PORT&scheme=http&region=…`. The endpoint comes from there,
else from the `endpoint` setting, else from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; `Storage.uri` always
spells it out, so that boto3 here and pyarrow inside Ray speak to the same server. Credentials come from the
environment (the standard AWS chain) only: a location that carries some is refused; none are kept, printed
or pickled.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod

from mtlsign.errors import StorageError, TooLargeError

LIST_LIMIT = 100_000
"""Most names that one `list` or `delete` looks at."""

TEMPORARY_PREFIX = ".tmp-"
_NAME_BYTES = 900

Names = list[str]


class Storage(ABC):
    """A folder that holds named files; names are relative, `/`-separated, and never leave the folder."""

    uri: str
    """Where this is: an absolute local path, or a full S3 location with its endpoint (never credentials)."""

    def ray_path(self) -> str:
        """The `storage_path` of Ray's RunConfig for this very folder on this very server."""
        return self.uri

    @abstractmethod
    def child(self, name: str) -> Storage:
        """The folder `name` below this one; nothing is touched."""

    @abstractmethod
    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write one whole file atomically: a reader sees the old bytes or the new, never a part.

        Args:
            name: where, below this folder.
            data: the whole content.
            only_if_new: leave an existing file alone. Among racing writers exactly one wins. (A winner whose
                answer was lost on the way is told False: compare what is there.)

        Returns: False if `only_if_new` and the file is already there, else True.
        Raises: StorageError when the place is unreachable, refuses us or is full.
        """

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """The file's bytes; its size is known and checked before anything is read.

        Raises: ArtifactError when it is missing, no plain file, or over `limit` bytes; StorageError when the
            place is unreachable or refuses us.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file (not a folder) of that name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the file or the whole folder `name`, manifests first: no folder is ever half there."""

    def check_writable(self) -> None:
        """Write, re-write and remove a probe: the place must honour "only if new", which manifests rely on.

        Raises: StorageError naming `storage`, within about ten seconds when nothing answers.
        """
        detector = f"mtlsign-probe-{secrets.token_hex(8)}"
        first = self.write(detector, b"first", if_absent=True)
        try:
            second = self.write(detector, b"second", if_absent=True)
            if not first or second or self.read(detector, 16) != b"first":
                raise StorageError(
                    f"{self.uri} overwrites a file that was to be written only if new; "
                    "use a server that honours If-None-Match (AWS S3, SeaweedFS, Ceph) or a local folder",
                    field="storage",
                )
        finally:
            self.delete(detector)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abstractmethod
    def list(self, prefix: str = "") -> Names:
        """Names of all files in the folder `prefix` (default: everything), at any depth, sorted."""


def validate_name(name: str) -> str:
    """`name` itself, if it is safe below a folder: relative, no `.` or `..`, backslash, control character.

    Raises: StorageError otherwise.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or part.startswith(TEMPORARY_PREFIX) for part in parts)
    if bad or "\\" in name or not name.isprintable() or len(name.encode("utf-8", "replace")) > _NAME_BYTES:
        raise StorageError(f"{name[:80]!r} is no safe file name; use plain relative names without '..'")
    return name


def check_size(place: str, size: int, limit: int) -> None:
    """Raises: ArtifactError when `size` bytes are more than `limit`."""
    if size > limit:
        raise TooLargeError(
            f"{place} has more than the {limit} bytes allowed here; give the right file or raise the limit"
        )
