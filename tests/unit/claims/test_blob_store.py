"""Archive over several storages."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.claims.blob_store import BlobStore
from mtlsign.errors import ArtifactError, StorageError, TooLargeError
from mtlsign.storage.local import LocalStorage


class UnreachableStorage(LocalStorage):
    """Storage whose server does not answer."""

    def exists(self, name: str) -> bool:
        raise StorageError("The server does not answer. Start it.", field="archive")


def test_get_with_unreachable_oversized_or_altered_first_storage_reads_the_next(tmp_path: Path) -> None:
    good = LocalStorage(tmp_path / "good")
    digest = BlobStore([good]).put(b"content")
    oversized, altered = LocalStorage(tmp_path / "large"), LocalStorage(tmp_path / "altered")
    oversized.write(f"blobs/{digest.hex()}", bytes(100))
    altered.write(f"blobs/{digest.hex()}", b"another")
    unreachable = UnreachableStorage(tmp_path / "unreachable")
    archive = BlobStore([unreachable, oversized, altered, good])
    assert archive.get(digest, 50) == b"content" and archive.has(digest)


def test_get_without_the_content_distinguishes_missing_oversized_and_unreachable(tmp_path: Path) -> None:
    empty, unreachable = LocalStorage(tmp_path / "a"), UnreachableStorage(tmp_path / "b")
    digest = bytes(32)
    with pytest.raises(ArtifactError, match="in none of the archives"):
        BlobStore([empty]).get(digest, 50)
    with pytest.raises(StorageError, match="does not answer"):
        BlobStore([unreachable, empty]).get(digest, 50)
    assert not BlobStore([unreachable, empty]).has(digest)
    empty.write(f"blobs/{digest.hex()}", bytes(100))
    with pytest.raises(TooLargeError):
        BlobStore([empty]).get(digest, 50)
