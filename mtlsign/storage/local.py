"""Local storage, and the atomic file write that every writer of local files uses."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import LIST_LIMIT, TEMPORARY_PREFIX, Names, Storage, check_size, validate_name


@contextmanager
def open_atomic(
    path: Path, *, mode: int = 0o600, exclusive: bool = False, without_hard_links: bool = False
) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends without an exception.

    A reader sees the old content or the new, never a part. File and folder are synced to the disk.

    Args:
        path: the final file; its folder must exist.
        mode: permissions of the new file, reduced by the umask.
        exclusive: raise `FileExistsError` instead of replacing an existing file; among racing writers exactly
            one succeeds. Needs hard links.
        without_hard_links: with `exclusive`, fall back to an empty file that is then replaced where the file
            system lacks hard links. A reader may see the empty file.

    Raises:
        OSError: the file cannot be written, or it exists and `exclusive` is set.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(temporary, _CREATE, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _link_exclusive(temporary, path, mode, without_hard_links)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def atomic_write(
    path: Path, data: bytes, *, mode: int = 0o600, exclusive: bool = False, without_hard_links: bool = False
) -> None:
    """Write `data` as the file `path`; see `open_atomic` for the arguments.

    Raises:
        OSError: the file cannot be written, or it exists and `exclusive` is set.
    """
    with open_atomic(path, mode=mode, exclusive=exclusive, without_hard_links=without_hard_links) as file:
        file.write(data)


_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _link_exclusive(temporary: Path, path: Path, mode: int, without_hard_links: bool) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, a link never replaces an existing file
    except FileExistsError:
        raise
    except OSError:
        if not without_hard_links:
            raise
        os.close(os.open(path, _CREATE, mode))
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStorage(Storage):
    """Folder of this machine, or of a mount that every node shares. The first write creates it.

    Symbolic links below the folder are followed. Do not read a folder in which other users may create links.

    Args:
        root: the folder.
        private: topmost folder whose files only their owner may read: `root` or a folder above it.
    """

    def __init__(self, root: Path, *, private: Path | None = None) -> None:
        self.root, self._private = root, private
        self.uri = str(root)

    def child(self, name: str, *, private: bool = False) -> LocalStorage:  # noqa: D102
        root = self._path(name)
        return LocalStorage(root, private=self._private or (root if private else None))

    def _make_folder(self, folder: Path) -> None:
        """Create the folder and its missing parents; private ones get mode 0700."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            is_private = self._private is not None and path.is_relative_to(self._private)
            path.mkdir(mode=0o700 if is_private else 0o777, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.root / validate_name(name)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:  # noqa: D102
        target = self._path(name)
        with _local_errors("write", target):
            self._make_folder(target.parent)
            try:
                mode = 0o666 if self._private is None else 0o600
                atomic_write(target, data, mode=mode, exclusive=if_absent)
            except FileExistsError:
                if not if_absent:
                    raise
                return False
        return True

    def read(self, name: str, limit: int) -> bytes:  # noqa: D102
        path = self._path(name)
        with _local_errors("read", path):
            # O_NONBLOCK: opening a named pipe would otherwise block for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise ArtifactError(f"{path} is not a regular file. Pass a regular file.")
                check_size(str(path), status.st_size, limit)
                data = file.read(min(limit, status.st_size) + 1)  # read() allocates its whole argument
        check_size(str(path), len(data), limit)
        return data

    def exists(self, name: str) -> bool:  # noqa: D102
        with _local_errors("read", self._path(name)):
            return self._path(name).is_file()

    def delete(self, name: str) -> None:  # noqa: D102
        path = self._path(name)
        with _local_errors("delete", path):
            if path.is_dir() and not path.is_symlink():
                for file in self.list(name):
                    if file.rsplit("/", 1)[-1] == "manifest.json":
                        (self.root / file).unlink(missing_ok=True)
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
                names += [(relative / f).as_posix() for f in files if not f.startswith(TEMPORARY_PREFIX)]
                if len(names) > LIST_LIMIT:
                    raise StorageError(f"{top} has more than {LIST_LIMIT} files. Choose another folder.")
        return sorted(names)


@contextmanager
def _local_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if action == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise ArtifactError(f"{path} does not exist. Pass the right path.") from None
        if error.errno in _FULL:
            raise StorageError(
                f"The disk has no space for {path}. Free some space, then repeat the command; "
                "an interrupted run continues with --resume.",
                field="storage",
            ) from error
        fix = "Choose a folder that you may read and write, on a disk with free space."
        raise StorageError(f"Cannot {action} {path}: {error.strerror}. {fix}", field="storage") from error
