"""Where the bytes behind a claim lie: suspects, references, heads, by their SHA-256, in a folder or on S3.

A claim names digests only. Whoever checks it looks them up in the archives that its own operator named, so no
pointer of a stranger is ever followed. What comes out has been hashed: an archive need not be trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_file, open_storage
from mtlsign.storage.manifest import GIB, read_manifest_folder

MAX_MODEL = 2 * GIB
MAX_REFERENCE = 64 * 2**20
MAX_HEAD = GIB


class BlobStore:
    """One or more places that hold `blobs/<sha256>`; the first is written to, all are read, in order."""

    def __init__(self, places: Sequence[Storage]) -> None:
        if not places:
            raise StorageError("is missing; give a folder or s3://bucket/prefix", field="archive")
        self.places = list(places)

    @classmethod
    def at(cls, locations: str | None, *, ledger: str = "", endpoint: str | None = None) -> BlobStore:
        """From comma-separated locations; without any, `PATH.archive` beside an SQLite ledger.

        Raises:
            StorageError: no location, though the ledger is not a local file; or a malformed one.
        """
        named = [place.strip() for place in (locations or "").split(",") if place.strip()]
        if not named and ledger.startswith("sqlite:///"):
            named = [ledger.removeprefix("sqlite:///") + ".archive"]
        return cls([open_storage(place, endpoint=endpoint) for place in named])

    def put(self, data: bytes) -> bytes:
        """Write the bytes, read them back, and return their SHA-256 (32 bytes)."""
        digest = hashlib.sha256(data).digest()
        name, place = _name(digest), self.places[0]
        if not place.exists(name):
            place.write(name, data)
        if hashlib.sha256(place.read(name, len(data))).digest() != digest:
            raise ArtifactError(f"{place.uri} gives other bytes than were written; choose another archive")
        return digest

    def get(self, digest: bytes, limit: int) -> bytes:
        """The bytes of that SHA-256, at most `limit` of them. Raises ArtifactError when no place has them."""
        for place in self.places:
            if place.exists(_name(digest)):
                data = place.read(_name(digest), limit)
                if hashlib.sha256(data).digest() == digest:
                    return data
        raise ArtifactError(
            f"{digest.hex()} is in none of the archives; ask whoever named it, or add --archive",
            field="archive",
        )

    def has(self, digest: bytes) -> bool:
        """Whether some place has a file of that name."""
        return any(place.exists(_name(digest)) for place in self.places)


def _name(digest: bytes) -> str:
    return f"blobs/{digest.hex()}"


def read_model_bytes(location: str, *, endpoint: str | None = None) -> bytes:
    """A model's safetensors bytes, at most 2 GiB, from a model folder or one `.safetensors` file.

    Raises:
        ArtifactError, StorageError: missing, damaged, too large, or unreachable.
    """
    from mtlsign.storage.model_folder import MODEL_FILE

    path = location.partition("?")[0] if location.startswith("s3:") else location
    if path.endswith(".safetensors"):
        storage, name = open_file(location, endpoint=endpoint)
        return storage.read(name, MAX_MODEL)
    return read_manifest_folder(
        open_storage(location, endpoint=endpoint), file_limit=MAX_MODEL, names=(MODEL_FILE,)
    )[MODEL_FILE]
