"""One door to where things are written: a local folder or `s3://bucket/prefix` (design decision 10).

An S3 location may carry `?endpoint_override=HOST:PORT&scheme=http&region=…`. The endpoint comes from there,
else from the `endpoint` setting, else from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL; `Storage.uri` always
spells it out, so that boto3 here and pyarrow inside Ray speak to the same server. Credentials come from the
environment (the standard AWS chain) only: a location that carries some is refused; none are kept, printed
or pickled.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtlsign.errors import ArtifactError, StorageError

LIST_LIMIT = 100_000
"""Most names that one `list` or `delete` looks at."""

_TEMPORARY = ".tmp-"
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
    def write(self, name: str, data: bytes, *, only_if_new: bool = False) -> bool:
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
        probe = f"mtlsign-probe-{secrets.token_hex(8)}"
        first = self.write(probe, b"first", only_if_new=True)
        try:
            second = self.write(probe, b"second", only_if_new=True)
            if not first or second or self.read(probe, 16) != b"first":
                raise StorageError(
                    f"{self.uri} overwrites a file that was to be written only if new; "
                    "use a server that honours If-None-Match (AWS S3, SeaweedFS, Ceph) or a local folder",
                    field="storage",
                )
        finally:
            self.delete(probe)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abstractmethod
    def list(self, prefix: str = "") -> Names:
        """Names of all files in the folder `prefix` (default: everything), at any depth, sorted."""


class LocalStorage(Storage):
    """A folder of this machine (or a mount that every node shares); it is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def child(self, name: str) -> LocalStorage:  # noqa: D102
        return LocalStorage(self._path(name))

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def write(self, name: str, data: bytes, *, only_if_new: bool = False) -> bool:  # noqa: D102
        target = self._path(name)
        temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with _local_errors("write", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if only_if_new:
                    try:
                        os.link(temporary, target)
                    except FileExistsError:
                        return False
                else:
                    os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return True

    def read(self, name: str, limit: int) -> bytes:  # noqa: D102
        path = self._path(name)
        with _local_errors("read", path):
            # O_NONBLOCK: opening a named pipe would otherwise wait for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise ArtifactError(f"{path} is no plain file; give one")
                check_size(str(path), found.st_size, limit)
                data = file.read(min(limit, found.st_size) + 1)  # read allocates what it is asked for
        check_size(str(path), len(data), limit)
        return data

    def exists(self, name: str) -> bool:  # noqa: D102
        with _local_errors("read", self._path(name)):
            return self._path(name).is_file()

    def delete(self, name: str) -> None:  # noqa: D102
        path = self._path(name)
        with _local_errors("delete", path):
            if path.is_dir() and not path.is_symlink():
                for found in self.list(name):
                    if found.rsplit("/", 1)[-1] == "manifest.json":
                        (self.root / found).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def check_writable(self) -> None:  # noqa: D102
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            super().check_writable()
        finally:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()

    def list(self, prefix: str = "") -> Names:  # noqa: D102
        top = self._path(prefix) if prefix else self.root
        names: Names = []
        with _local_errors("list", top):
            for folder, _, files in os.walk(top):
                relative = Path(folder).relative_to(self.root)
                names += [(relative / f).as_posix() for f in files if not f.startswith(_TEMPORARY)]
                if len(names) > LIST_LIMIT:
                    raise StorageError(f"{top} holds more than {LIST_LIMIT} files; choose another folder")
        return sorted(names)


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
    from mtlsign.s3 import open_s3

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


def checked_name(name: str) -> str:
    """`name` itself, if it is safe below a folder: relative, no `.` or `..`, backslash, control character.

    Raises: StorageError otherwise.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or part.startswith(_TEMPORARY) for part in parts)
    if bad or "\\" in name or not name.isprintable() or len(name.encode("utf-8", "replace")) > _NAME_BYTES:
        raise StorageError(f"{name[:80]!r} is no safe file name; use plain relative names without '..'")
    return name


def check_size(place: str, size: int, limit: int) -> None:
    """Raises: ArtifactError when `size` bytes are more than `limit`."""
    if size > limit:
        raise ArtifactError(
            f"{place} has more than the {limit} bytes allowed here; give the right file or raise the limit"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _local_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if action == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise ArtifactError(f"{path} does not exist; give the right path") from None
        fix = "choose a folder on a disk with room where you may read and write"
        raise StorageError(f"cannot {action} {path}: {error.strerror}; {fix}", field="storage") from error
