"""Folder of files named by the SHA-256 of their bytes. A digest never names an incomplete file."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PARTIAL = ".part-"
_NAME = re.compile(r"[0-9a-f]{64}")
#: Age in seconds at which a partial file is deleted: its process has crashed.
STALE_S = 3600
YOUNG_S = 60


class ContentStore:
    """Content-addressed folder, mode 0700."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return the path of the file of that digest; it need not exist."""
        if not _NAME.fullmatch(digest):
            raise ValueError("not a digest")
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Return whether the file of that digest exists."""
        return self.path(digest).is_file()

    @contextmanager
    def pending_file(self) -> Iterator[PendingFile]:
        """Open a new file. It is deleted at the end of the block unless `PendingFile.commit` was called."""
        part = self.folder / f"{PARTIAL}{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
                yield PendingFile(self, part, file)
        finally:
            part.unlink(missing_ok=True)

    def delete_unreferenced(self, referenced: Collection[str]) -> None:
        """Delete unreferenced files and stale partial files. Open files remain readable.

        Files younger than one minute are kept, because their upload may not be registered yet.
        """
        now = time.time()
        for path, status in self._entries():
            age = STALE_S if path.name.startswith(PARTIAL) else YOUNG_S
            if path.name not in referenced and status.st_mtime < now - age:
                path.unlink(missing_ok=True)

    def evict_to(self, limit: int) -> None:
        """Delete the least recently used files until at most `limit` bytes remain."""
        now, files = time.time(), []
        for path, status in self._entries():
            if _NAME.fullmatch(path.name):
                files.append((status.st_mtime, status.st_size, path))
            elif status.st_mtime < now - STALE_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name) or path.name.startswith(PARTIAL):
                with suppress(OSError):
                    yield path, path.stat()


class PendingFile:
    """File that is being received. Its digest is computed while it is written."""

    def __init__(self, store: ContentStore, part: Path, file: IO[bytes]) -> None:
        self._store, self._part, self._file, self._hash, self.size = store, part, file, hashlib.sha256(), 0

    def write(self, piece: bytes) -> None:
        """Append bytes."""
        self._file.write(piece)
        self._hash.update(piece)
        self.size += len(piece)

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far, hex."""
        return self._hash.hexdigest()

    def commit(self) -> Path:
        """Sync the file and move it to its digest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._store.path(self.digest)
        os.replace(self._part, target)
        return target
