"""Content-addressed archive of models, references and heads, in folders or on S3.

A claim contains SHA-256 digests and no locations. A verifier looks the digests up in the archives of its
operator, so it never follows a location chosen by another party. All returned bytes have been hashed;
therefore an archive need not be trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress

from mtlsign.errors import ArtifactError, StorageError, TooLargeError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import GIB

MAX_MODEL = 2 * GIB
MAX_REFERENCE = 64 * 2**20
MAX_HEAD = GIB


class BlobStore:
    """Archive over one or more storages with the objects `blobs/<sha256>`.

    Args:
        storages: the first one is written to; all are read, in order.
    """

    def __init__(self, storages: Sequence[Storage]) -> None:
        if not storages:
            raise StorageError("No archive is given. Pass a folder or s3://bucket/prefix.", field="archive")
        self.storages = list(storages)

    @classmethod
    def from_locations(
        cls, locations: Sequence[str], *, ledger: str = "", endpoint: str | None = None
    ) -> BlobStore:
        """Open the archive at the given locations.

        Args:
            locations: folders or `s3://` prefixes. If empty, an SQLite ledger's path with `.archive`.
            ledger: URI of the ledger.
            endpoint: S3 endpoint.

        Raises:
            StorageError: there is no location although the ledger is not a local file, or one is malformed.
        """
        names = list(locations)
        if not names and ledger.startswith("sqlite:///"):
            names = [ledger.removeprefix("sqlite:///") + ".archive"]
        return cls([open_storage(name, endpoint=endpoint) for name in names])

    def put(self, data: bytes) -> bytes:
        """Write bytes, read them back, and return their SHA-256 (32 bytes)."""
        digest = hashlib.sha256(data).digest()
        name, storage = _name(digest), self.storages[0]
        if not storage.exists(name):
            storage.write(name, data)
        if hashlib.sha256(storage.read(name, len(data))).digest() != digest:
            raise ArtifactError(
                f"{storage.uri} returns other bytes than were written. Use another archive.", field="archive"
            )
        return digest

    def get(self, digest: bytes, limit: int) -> bytes:
        """Return the bytes with this SHA-256, at most `limit` bytes.

        A storage that fails, or whose object is too large or altered, does not hide another one.

        Raises:
            ArtifactError: no storage has them within the limit.
            StorageError: no storage has them, and at least one could not be asked.
        """
        problem: StorageError | None = None
        is_too_large = False
        for storage in self.storages:
            try:
                if not storage.exists(_name(digest)):
                    continue
                data = storage.read(_name(digest), limit)
            except TooLargeError:
                is_too_large = True
            except ArtifactError:
                continue
            except StorageError as error:
                problem = error
            else:
                if hashlib.sha256(data).digest() == digest:
                    return data
        if problem is not None:
            raise problem
        if is_too_large:
            raise TooLargeError(
                f"{digest.hex()} has more than the {limit} bytes allowed. Claim a smaller model.",
                field="archive",
            )
        raise ArtifactError(
            f"{digest.hex()} is in none of the archives. Ask the claimant for it, or add an --archive.",
            field="archive",
        )

    def has(self, digest: bytes) -> bool:
        """Return whether a storage has an object with this name; its content is not checked."""
        for storage in self.storages:
            with suppress(StorageError):
                if storage.exists(_name(digest)):
                    return True
        return False


def _name(digest: bytes) -> str:
    return f"blobs/{digest.hex()}"


def read_model_bytes(location: str, *, endpoint: str | None = None) -> bytes:
    """Return a model's safetensors bytes, at most 2 GiB, from any location that `read_model` accepts.

    Raises:
        ArtifactError, ModelError, StorageError: the model is missing, damaged, too large, of another format,
            or unreachable.
    """
    from mtlsign.storage.model_folder import read_model_bytes as read  # imports PyTorch, which takes seconds

    return read(location, endpoint=endpoint, max_bytes=MAX_MODEL)
