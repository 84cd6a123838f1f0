"""Models on disk by their digest: uploads that a token owns, and a bounded cache of what was fetched.

Every file's name is the SHA-256 of its bytes, computed while they came in. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import MTLSignError, TooLargeError
from mtlsign.service import metrics
from mtlsign.service.fetch.https import Resolver, Transport, open_https, system_resolver
from mtlsign.service.fetch.locations import (
    AllowedLocations,
    HttpsResource,
    LocalFile,
    S3Object,
    Source,
    UploadedFile,
    location_refused,
)
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, MANIFEST_LIMIT, parse_manifest
from mtlsign.storage.model_folder import MODEL_FILE
from mtlsign.storage.s3 import S3Storage

PIECE = 2**20
PARTIAL = ".part-"
_NAME = re.compile(r"[0-9a-f]{64}")
#: A half-written file of a process that died is removed after this many seconds.
STALE_S = 3600
YOUNG_S = 60


class ContentStore:
    """A folder of files named by their SHA-256, mode 0700."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the file of that digest lies, if it does."""
        if not _NAME.fullmatch(digest):
            raise ValueError("not a digest")
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Whether it is there."""
        return self.path(digest).is_file()

    @contextmanager
    def writing(self) -> Iterator[PendingFile]:
        """A file that comes in; without `Writing.keep` nothing remains."""
        part = self.folder / f"{PARTIAL}{secrets.token_hex(8)}"
        try:
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                yield PendingFile(self, part, file)
        finally:
            part.unlink(missing_ok=True)

    def sweep(self, wanted: Collection[str]) -> None:
        """Delete what is not wanted, and what a dead process left half written; readers keep what they have.

        A file younger than a minute stays: whoever brings it is about to say that it is wanted.
        """
        now = time.time()
        for path, status in self._entries():
            age = STALE_S if path.name.startswith(PARTIAL) else YOUNG_S
            if path.name not in wanted and status.st_mtime < now - age:
                path.unlink(missing_ok=True)

    def trim(self, limit: int) -> None:
        """Delete the files used longest ago until at most `limit` bytes are left."""
        now, found = time.time(), []
        for path, status in self._entries():
            if _NAME.fullmatch(path.name):
                found.append((status.st_mtime, status.st_size, path))
            elif status.st_mtime < now - STALE_S:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
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
    """One file on its way in."""

    def __init__(self, shelf: ContentStore, part: Path, file: IO[bytes]) -> None:
        self._shelf, self._part, self._file, self._hash, self.size = shelf, part, file, hashlib.sha256(), 0

    def write(self, piece: bytes) -> None:
        """Add bytes."""
        self._file.write(piece)
        self._hash.update(piece)
        self.size += len(piece)

    @property
    def digest(self) -> str:
        """SHA-256 of what came so far, hex."""
        return self._hash.hexdigest()

    def keep(self) -> Path:
        """Make it a file of the shelf."""
        self._file.flush()
        os.fsync(self._file.fileno())
        target = self._shelf.path(self.digest)
        os.replace(self._part, target)
        return target


class ModelFetcher:
    """Brings what a pointer names onto this machine: one download at a time for each pointer."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        resolver: Resolver = system_resolver,
        transport: Transport | None = None,
    ) -> None:
        self.settings, self.policy = settings, AllowedLocations.of(settings.allow)
        self.uploads, self.cache = (
            ContentStore(settings.state / "uploads"),
            ContentStore(settings.state / "cache"),
        )
        self._resolver, self._transport = resolver, transport
        self._known: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.downloads = 0

    def model(self, pointer: str) -> tuple[str, Path, bool]:
        """(digest, file, was it here) of the model behind a pointer: a folder of ours or one `.safetensors`.

        Raises: Problem.
        """
        source = self.policy.source(pointer)
        if isinstance(source, UploadedFile):
            return source.digest, self._uploaded(source.digest), True
        with self._alone(pointer):
            known = self._known.get(pointer)
            if known and known[0] > time.monotonic() and self.cache.has(known[1]):
                os.utime(self.cache.path(known[1]))
                return known[1], self.cache.path(known[1]), True
            digest, path, here = self._fetch_model(source, known[1] if known else None)
            self._known[pointer] = (time.monotonic() + self.settings.pointer_s, digest)
            while len(self._known) > 10_000:
                self._known.pop(next(iter(self._known)))
            return digest, path, here

    def bundle(self, pointer: str) -> bytes:
        """The bytes of a bundle behind a pointer. Raises: Problem."""
        source, limit = self.policy.source(pointer), self.settings.max_bundle_mb * MIB
        if isinstance(source, UploadedFile):
            path = self._uploaded(source.digest)
            if path.stat().st_size > limit:
                raise Problem("too-large", f"a bundle has at most {limit} bytes")
            return path.read_bytes()
        with self._reading(source, limit) as (_, pieces):
            return b"".join(pieces)

    def _uploaded(self, digest: str) -> Path:
        if not self.uploads.has(digest):
            raise Problem(
                "not-found",
                "no upload of this digest lies where the verifier runs: it expired (send it again), or the "
                "verifiers' machines do not see the service's folder (use a pointer to s3:// or https://)",
            )
        return self.uploads.path(digest)

    @contextmanager
    def _alone(self, pointer: str) -> Iterator[None]:
        with self._lock:
            lock = self._locks.setdefault(pointer, threading.Lock())
        with lock:
            try:
                yield
            finally:
                with self._lock:
                    if len(self._locks) > 1000:
                        self._locks = {k: v for k, v in self._locks.items() if v.locked()}

    def _fetch_model(self, source: Source, before: str | None) -> tuple[str, Path, bool]:
        """`before`: the digest that this pointer brought earlier. Only then is a manifest's word for what
        lies there enough: a manifest may name a digest whose bytes its writer never had.
        """
        expected = None
        if not _last(source).endswith(".safetensors"):
            source, expected = self._in_folder(source)
            if expected == before and self.cache.has(expected):
                os.utime(self.cache.path(expected))
                return expected, self.cache.path(expected), True
        with self._reading(source, self.settings.model_limit) as (size, pieces), self.cache.writing() as file:
            for piece in pieces:
                file.write(piece)
            if file.size != size:
                raise Problem("unreachable", f"{file.size} of {size} bytes came; try again")
            if expected is not None and file.digest != expected:
                raise Problem("wrong-digest", "the model is not the one that its manifest names")
            digest, path = file.digest, file.keep()
        self.downloads += 1
        self.cache.trim(self.settings.cache_mb * MIB)
        return digest, path, False

    def _in_folder(self, source: Source) -> tuple[Source, str]:
        with self._reading(_below(source, MANIFEST), MANIFEST_LIMIT) as (_, pieces):
            data = b"".join(pieces)
        try:
            entry = parse_manifest(data).get(MODEL_FILE)
        except MTLSignError as error:
            raise problem_from_error(error, about="model") from None
        if entry is None:
            raise Problem("not-a-model", f"the folder has no {MODEL_FILE}; point to a model folder or file")
        if entry.size > self.settings.model_limit:
            raise Problem(
                "too-large", f"the model has {entry.size} bytes, {self.settings.model_limit} are allowed"
            )
        return _below(source, MODEL_FILE), entry.sha256

    @contextmanager
    def _reading(self, source: Source, limit: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        end = time.monotonic() + self.settings.fetch_s
        try:
            if isinstance(source, LocalFile):
                with _open_below(source) as (file, size):
                    if size > limit:
                        raise Problem(
                            "too-large", f"{size} bytes lie behind the pointer, {limit} are allowed"
                        )
                    yield size, iter(lambda: file.read(PIECE), b"")
            elif isinstance(source, S3Object):
                folder, _, name = source.key.rpartition("/")
                where = f"s3://{source.bucket}" + (f"/{folder}" if folder else "")
                storage = open_storage(where, endpoint=self.settings.endpoint)
                assert isinstance(storage, S3Storage)
                with storage.open_read(name, limit) as (size, pieces):
                    yield size, _until(pieces, end, self.settings.fetch_s)
            elif isinstance(source, HttpsResource):
                with open_https(
                    source, self.policy, limit, self.settings.fetch_s,
                    resolver=self._resolver, transport=self._transport,
                ) as found:  # fmt: skip
                    yield found
        except TooLargeError:
            raise Problem("too-large", f"The model has more than the {limit} bytes allowed.") from None
        except MTLSignError as error:
            metrics.log_event("not_fetched", reason=str(error))
            detail = "what the pointer names cannot be had; correct the pointer, or try later"
            raise Problem("unreachable", detail) from None


def _until(pieces: Iterator[bytes], end: float, seconds: float) -> Iterator[bytes]:
    for piece in pieces:
        if time.monotonic() > end:
            raise Problem("too-long", f"the fetch took over {seconds:g} seconds; try again")
        yield piece


def _last(source: Source) -> str:
    if isinstance(source, LocalFile):
        return source.parts[-1] if source.parts else ""
    return source.path.partition("?")[0] if isinstance(source, HttpsResource) else getattr(source, "key", "")


def _below(source: Source, name: str) -> Source:
    if isinstance(source, LocalFile):
        return LocalFile(source.root, (*source.parts, name))
    if isinstance(source, S3Object):
        return S3Object(source.bucket, f"{source.key}/{name}".lstrip("/"))
    if isinstance(source, HttpsResource):
        path, _, _ = source.path.partition("?")
        return HttpsResource(source.host, source.port, f"{path.rstrip('/')}/{name}")
    raise location_refused("names an upload, which is one file")


@contextmanager
def _open_below(source: LocalFile) -> Iterator[tuple[IO[bytes], int]]:
    """A plain file below the allowed folder; no link is followed on the way, whoever makes one meanwhile."""
    at = -1
    try:
        at = os.open(source.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(source.parts):
            last = i == len(source.parts) - 1
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            following = os.open(part, flags, dir_fd=at)
            os.close(at)
            at = following
        status = os.fstat(at)
        if not stat.S_ISREG(status.st_mode):
            raise location_refused("names no plain file")
    except OSError as error:
        if at >= 0:
            os.close(at)
        if isinstance(error, FileNotFoundError):
            raise Problem("unreachable", "there is no such file; correct the pointer") from None
        raise location_refused(
            "leads through a link or something that is no folder or file of ours to read"
        ) from None
    except Problem:
        os.close(at)
        raise
    with os.fdopen(at, "rb") as file:
        yield file, status.st_size
