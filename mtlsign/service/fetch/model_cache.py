"""Fetching of models and bundles: uploads of clients, and a bounded cache of fetched models."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import ModelError, MTLSignError, TooLargeError
from mtlsign.service import metrics
from mtlsign.service.fetch.content_store import ContentStore, PendingFile
from mtlsign.service.fetch.https import Resolver, Transport, open_https, system_resolver
from mtlsign.service.fetch.local_files import MissingFile, open_below
from mtlsign.service.fetch.locations import (
    AllowedLocations,
    HttpsResource,
    LocalFile,
    Location,
    S3Object,
    UploadedFile,
    location_refused,
)
from mtlsign.service.fetch.model_formats import (
    HUGGING_FACE_FILES,
    problem_of_content,
    problem_of_file_name,
    problem_of_folder,
    problem_of_suffix,
)
from mtlsign.service.fetch.shards import INDEX, MAX_INDEX, join_shards, shard_names
from mtlsign.service.problems import NOT_FETCHED, Problem, problem_from_error
from mtlsign.storage.gguf_format import write_as_safetensors
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, MANIFEST_LIMIT, parse_manifest
from mtlsign.storage.model_folder import MODEL_FILE
from mtlsign.storage.s3 import S3Storage

PIECE = 2**20
MAX_RECENT = 10_000
MAX_LOCKS = 1000


class ModelFetcher:
    """Fetcher of models and bundles to this machine. Each location is downloaded by one thread at a time.

    Args:
        settings: limits, allowed locations and the state folder.
        resolver: resolver of host names.
        transport: sender of https requests; None: urllib3.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        resolver: Resolver = system_resolver,
        transport: Transport | None = None,
    ) -> None:
        self.settings, self.allowed = settings, AllowedLocations.parse(settings.allowed_locations)
        self.uploads = ContentStore(settings.state_dir / "uploads")
        self.cache = ContentStore(settings.state_dir / "cache")
        self._resolver, self._transport = resolver, transport
        #: location → (time until which it is not fetched again, digest)
        self._recent: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.downloads = 0

    def fetch_model(self, text: str) -> tuple[str, Path, bool]:
        """Fetch the model at a location: a model folder, a folder of shards, a `.safetensors` or GGUF file.

        Returns:
            Its digest, the local file, and whether it was in the cache.

        Raises:
            Problem: the location is refused, or the model cannot be fetched within the limits.
        """
        location = self.allowed.resolve(text)
        if isinstance(location, UploadedFile):
            path = self._uploaded(location.digest)
            with path.open("rb") as file:
                problem = problem_of_content(file.read(8))
            if problem is not None:
                raise problem
            return location.digest, path, True
        with self._single_flight(text):
            recent = self._recent.get(text)
            if recent and recent[0] > time.monotonic() and self.cache.has(recent[1]):
                os.utime(self.cache.path(recent[1]))
                return recent[1], self.cache.path(recent[1]), True
            digest, path, cached = self._fetch(location, recent[1] if recent else None)
            self._recent[text] = (time.monotonic() + self.settings.location_cache_ttl_s, digest)
            while len(self._recent) > MAX_RECENT:
                self._recent.pop(next(iter(self._recent)))
            return digest, path, cached

    def fetch_bundle(self, text: str) -> bytes:
        """Fetch the bundle at a location. Raises Problem."""
        location, limit = self.allowed.resolve(text), self.settings.max_bundle_mb * MIB
        if isinstance(location, UploadedFile):
            path = self._uploaded(location.digest)
            if path.stat().st_size > limit:
                raise Problem("too-large", f"A bundle has at most {limit} bytes. Send a smaller one.")
            return path.read_bytes()
        with self._open(location, limit) as (_, pieces):
            return b"".join(pieces)

    def _uploaded(self, digest: str) -> Path:
        if not self.uploads.has(digest):
            raise Problem(
                "not-found",
                "The verifier has no upload of this digest. Upload it again if it has expired. Use s3:// or "
                "https:// if the verifiers run on machines without the state folder of the service.",
            )
        return self.uploads.path(digest)

    @contextmanager
    def _single_flight(self, text: str) -> Iterator[None]:
        """Hold the lock of one location."""
        with self._lock:
            lock = self._locks.setdefault(text, threading.Lock())
        with lock:
            try:
                yield
            finally:
                with self._lock:
                    if len(self._locks) > MAX_LOCKS:
                        self._locks = {k: v for k, v in self._locks.items() if v.locked()}

    def _fetch(self, location: Location, previous: str | None) -> tuple[str, Path, bool]:
        """Fetch a model; `previous` is the digest that this location gave before.

        A manifest alone is trusted only if it repeats that digest: its writer may name the digest of a model
        that he does not have, and could otherwise use another client's model from the cache.
        """
        expected = None
        if _file_name(location).lower().endswith(".gguf"):
            return self._fetch_gguf(location)
        if not _file_name(location).endswith(".safetensors"):
            if self._has_shards(location):
                return self._fetch_shards(location)
            location, expected = self._model_in_folder(location)
            if expected == previous and self.cache.has(expected):
                os.utime(self.cache.path(expected))
                return expected, self.cache.path(expected), True
        limit = self.settings.model_limit
        with self._open(location, limit) as (size, pieces), self.cache.pending_file() as file:
            for piece in pieces:
                file.write(piece)
            if file.size != size:
                raise Problem("unreachable", f"Only {file.size} of {size} bytes arrived. Try again.")
            if expected is not None and file.digest != expected:
                detail = "The model does not have the digest in its manifest. Write the folder again."
                raise Problem("wrong-digest", detail)
            return self._stored(file)

    def _stored(self, file: PendingFile) -> tuple[str, Path, bool]:
        """Move a complete file into the cache; return its digest and place, and that it was not there."""
        digest, path = file.digest, file.commit()
        self.downloads += 1
        self.cache.evict_to(self.settings.cache_mb * MIB)
        return digest, path, False

    def _download(self, location: Location, file: IO[bytes], limit: int) -> int:
        """Write a file of at most `limit` bytes to a local one; return its size."""
        with self._open(location, limit) as (size, pieces):
            received = sum(file.write(piece) for piece in pieces)
        if received != size:
            raise Problem("unreachable", f"Only {received} of {size} bytes arrived. Try again.")
        return size

    def _has_shards(self, location: Location) -> bool:
        """Return whether a location is a Hugging Face folder of several files, not a model folder."""
        if isinstance(location, HttpsResource) or problem_of_suffix(_file_name(location)) is not None:
            return False
        return self._exists(_child(location, INDEX)) and not self._exists(_child(location, MANIFEST))

    def _fetch_shards(self, location: Location) -> tuple[str, Path, bool]:
        """Fetch the files of a Hugging Face folder and join them; the digest is that of the joined file."""
        with self._open(_child(location, INDEX), MAX_INDEX) as (_, pieces):
            names = shard_names(b"".join(pieces))
        remaining, shards = self.settings.model_limit, []
        with ExitStack() as stack:
            for name in names:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self.cache.folder))
                size = self._download(_child(location, name), file, remaining)
                remaining -= size
                shards.append((size, file))
            with self.cache.pending_file() as target:
                join_shards(shards, target, max_tensors=self.settings.max_tensors)
                return self._stored(target)

    def _fetch_gguf(self, location: Location) -> tuple[str, Path, bool]:
        """Fetch a GGUF file and rewrite it; the digest is that of the safetensors file."""
        limit = self.settings.model_limit
        with tempfile.TemporaryFile(dir=self.cache.folder) as file:
            size = self._download(location, file, limit)
            file.seek(0)
            with self.cache.pending_file() as target:
                try:
                    write_as_safetensors(
                        file, size, target.write, max_bytes=limit, max_tensors=self.settings.max_tensors
                    )
                except ModelError as error:
                    raise Problem("not-a-model", error.detail) from None
                return self._stored(target)

    def _model_in_folder(self, location: Location) -> tuple[Location, str]:
        """Return the location of the model file in a model folder, and its digest in the manifest."""
        other_format = problem_of_suffix(_file_name(location).rpartition("/")[2])
        if other_format is not None:
            raise other_format
        try:
            with self._open(_child(location, MANIFEST), MANIFEST_LIMIT) as (_, pieces):
                data = b"".join(pieces)
        except Problem as problem:
            raise self._problem_without_manifest(location, problem) from None
        try:
            entry = parse_manifest(data).get(MODEL_FILE)
        except MTLSignError as error:
            raise problem_from_error(error, about="model") from None
        if entry is None:
            detail = f"The folder has no {MODEL_FILE}. Give the location of a model folder or file."
            raise Problem("not-a-model", detail)
        if entry.size > self.settings.model_limit:
            raise _too_large(entry.size, self.settings.model_limit)
        return _child(location, MODEL_FILE), entry.sha256

    def _problem_without_manifest(self, location: Location, problem: Problem) -> Problem:
        """Return the problem of a location below which `problem` prevents the reading of a manifest."""
        if isinstance(location, HttpsResource) or problem.kind not in ("unreachable", "pointer-refused"):
            return problem
        names = frozenset(name for name in HUGGING_FACE_FILES if self._exists(_child(location, name)))
        if names:
            return problem_of_folder(names)
        if self._exists(location):
            return problem_of_file_name()
        if isinstance(location, LocalFile) and isinstance(problem, MissingFile):
            try:
                with open_below(location):
                    return problem_of_file_name()
            except MissingFile:
                return Problem("unreachable", "No file or folder has this location. Correct the location.")
            except Problem:
                return problem_of_folder(names)
        return problem

    def _exists(self, location: Location) -> bool:
        """Return whether a file can be opened."""
        try:
            with self._open(location, self.settings.model_limit):
                return True
        except Problem as problem:
            return problem.kind == "too-large"

    @contextmanager
    def _open(self, location: Location, limit: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield the size and the pieces of a file. The size is checked before the first piece is read."""
        seconds = self.settings.fetch_timeout_s
        end = time.monotonic() + seconds
        try:
            if isinstance(location, LocalFile):
                with open_below(location) as (file, size):
                    if size > limit:
                        raise _too_large(size, limit)
                    yield size, iter(lambda: file.read(PIECE), b"")
            elif isinstance(location, S3Object):
                folder, _, name = location.key.rpartition("/")
                uri = f"s3://{location.bucket}" + (f"/{folder}" if folder else "")
                storage = open_storage(uri, endpoint=self.settings.endpoint)
                assert isinstance(storage, S3Storage)
                with storage.open_read(name, limit) as (size, pieces):
                    yield size, _until(pieces, end, seconds)
            elif isinstance(location, HttpsResource):
                with open_https(
                    location, self.allowed, limit, seconds,
                    resolver=self._resolver, transport=self._transport,
                ) as stream:  # fmt: skip
                    yield stream
        except TooLargeError:
            raise Problem("too-large", f"The file has more than the {limit} bytes allowed.") from None
        except MTLSignError as error:
            metrics.log_event("fetch_failed", reason=str(error))
            raise Problem("unreachable", NOT_FETCHED) from None


def _too_large(size: int, limit: int) -> Problem:
    return Problem("too-large", f"The file has {size} bytes; {limit} are allowed. Use a smaller file.")


def _until(pieces: Iterator[bytes], end: float, seconds: float) -> Iterator[bytes]:
    for piece in pieces:
        if time.monotonic() > end:
            raise Problem("too-long", f"Fetching took longer than {seconds:g} seconds. Try again.")
        yield piece


def _file_name(location: Location) -> str:
    if isinstance(location, LocalFile):
        return location.parts[-1] if location.parts else ""
    if isinstance(location, HttpsResource):
        return location.path.partition("?")[0]
    return getattr(location, "key", "")


def _child(location: Location, name: str) -> Location:
    if isinstance(location, LocalFile):
        return LocalFile(location.root, (*location.parts, name))
    if isinstance(location, S3Object):
        return S3Object(location.bucket, f"{location.key}/{name}".lstrip("/"))
    if isinstance(location, HttpsResource):
        path, _, _ = location.path.partition("?")
        return HttpsResource(location.host, location.port, f"{path.rstrip('/')}/{name}")
    raise location_refused("An upload is one file. Name the file itself.")
