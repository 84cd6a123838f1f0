"""mtlsign.storage.local."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import LIST_LIMIT, TEMPORARY_PREFIX, Names, Storage, check_size, validate_name


class LocalStorage(Storage):
    """A folder of this machine (or a mount that every node shares); it is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def child(self, name: str) -> LocalStorage:  # noqa: D102
        return LocalStorage(self._path(name))

    def _path(self, name: str) -> Path:
        return self.root / validate_name(name)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:  # noqa: D102
        target = self._path(name)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        with _local_errors("write", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
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
                names += [(relative / f).as_posix() for f in files if not f.startswith(TEMPORARY_PREFIX)]
                if len(names) > LIST_LIMIT:
                    raise StorageError(f"{top} holds more than {LIST_LIMIT} files; choose another folder")
        return sorted(names)


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
