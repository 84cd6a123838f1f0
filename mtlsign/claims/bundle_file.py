"""Reader of untrusted bundle files: names, size limits and the archive of the blobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtlsign.claims import merkle
from mtlsign.claims.blob_store import MAX_HEAD, MAX_MODEL, MAX_REFERENCE, BlobStore
from mtlsign.claims.ledger.checkpoints import MAX_NOTE
from mtlsign.claims.statements.envelope import MAX_ENVELOPE
from mtlsign.errors import ArtifactError, ClaimError, KeyMaterialError, LedgerError
from mtlsign.storage.strict_json import parse_strict_json, require_fields
from mtlsign.storage.versions import PUBLISH_AGAIN, refuse_version_0
from mtlsign.storage.zip_reader import BoundedZip, DamagedZipError

FORMAT = "mtlsign/bundle/v1"
MAX_BUNDLE = 6 * 2**30
MAX_PATH = 32 * merkle.MAX_PROOF
MAX_HEADER = 256
_NUMBER = r"(?:0|[1-9][0-9]{0,13})"
_LIMITS: list[tuple[re.Pattern[str], int]] = [
    (re.compile(r"bundle\.json"), MAX_HEADER),
    (re.compile(r"head"), MAX_NOTE),
    (re.compile(rf"entries/{_NUMBER}"), MAX_ENVELOPE),
    (re.compile(rf"entries/{_NUMBER}\.path"), MAX_PATH),
    (re.compile(rf"heads/{_NUMBER}"), MAX_NOTE),
    (re.compile(rf"heads/{_NUMBER}\.proof"), MAX_PATH),
    (re.compile(r"blobs/[0-9a-f]{64}"), max(MAX_MODEL, MAX_HEAD, MAX_REFERENCE)),
]


class BundleFile(BlobStore):
    """Members of a bundle, each read completely and within its limit. Its blobs serve as the archive."""

    def __init__(self, members: BoundedZip) -> None:
        self.members = members

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Raises ClaimError if it is missing or damaged."""
        try:
            return self.members.read(name)
        except DamagedZipError as error:
            raise damaged_error(error.detail.rstrip(".")) from None

    def hashes(self, name: str) -> list[bytes]:
        """Return a member of concatenated 32-byte hashes as a list."""
        data = self.read(name)
        if len(data) % 32:
            raise damaged_error(f"The member {name} is damaged")
        return [data[start : start + 32] for start in range(0, len(data), 32)]

    def claim_index(self) -> int:
        """Return the index of the claim that the bundle proves."""
        header = parse_strict_json(self.read("bundle.json"), limit=MAX_HEADER, where="bundle")
        refuse_version_0(header, "format", where="bundle", fix=PUBLISH_AGAIN)
        fields = require_fields(header, "bundle", "format", "claim")
        index = fields["claim"]
        if fields["format"] != FORMAT or type(index) is not int:
            raise damaged_error("The file is not a bundle of this version")
        return index

    @property
    def entry_indices(self) -> list[int]:
        """Indices of the entries in the bundle."""
        return self._numbers("entries/")

    @property
    def checkpoint_sizes(self) -> list[int]:
        """Sizes of the earlier checkpoints in the bundle."""
        return self._numbers("heads/")

    def _numbers(self, folder: str) -> list[int]:
        matches = (re.fullmatch(rf"{folder}({_NUMBER})", name) for name in self.members.names)
        return [int(match[1]) for match in matches if match]

    def verify_blobs(self) -> None:
        """Raise ClaimError if a blob does not have the digest in its name."""
        for name in self.members.names:
            if name.startswith("blobs/"):
                self.get(bytes.fromhex(name.removeprefix("blobs/")), MAX_MODEL)

    def get(self, digest: bytes, limit: int) -> bytes:
        """Return the blob with this SHA-256, at most `limit` bytes.

        Raises:
            ArtifactError: the bundle lacks it, or it is over the limit.
            ClaimError: it has another digest.
        """
        name = f"blobs/{digest.hex()}"
        if name not in self.members or self.members.size(name) > limit:
            raise ArtifactError(
                f"The bundle lacks {digest.hex()}. Get a complete bundle from its author.", field="bundle"
            )
        data = self.read(name)
        if hashlib.sha256(data).digest() != digest:
            raise damaged_error(f"The member {name} contains other bytes than its name states")
        return data

    def has(self, digest: bytes) -> bool:
        """Return whether the bundle has a blob with this digest."""
        return f"blobs/{digest.hex()}" in self.members


@contextmanager
def open_bundle(path: Path) -> Iterator[BundleFile]:
    """Open an untrusted bundle; inside the block, every error about its content becomes a ClaimError."""
    try:
        size = path.stat().st_size
        if size > MAX_BUNDLE or not path.is_file():
            raise damaged_error("The path is not a file of at most 6 GiB")
        with path.open("rb") as file:
            yield BundleFile(BoundedZip(file, size, member_limit=_member_limit))
    except DamagedZipError as error:
        raise damaged_error(error.detail.rstrip(".")) from None
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror or error}. Pass a bundle.", field="bundle") from None
    except KeyMaterialError as error:
        raise ClaimError(error.detail, field=error.field) from None
    except LedgerError as error:
        raise ClaimError(f"The entries do not form a ledger: {error}", field="bundle") from None


def damaged_error(problem: str) -> ClaimError:
    """Return the error for a damaged bundle. `problem` is a sentence without its full stop."""
    return ClaimError(f"{problem}. Get the bundle from its author once more.", field="bundle")


def _member_limit(name: str) -> int | None:
    return next((limit for pattern, limit in _LIMITS if pattern.fullmatch(name)), None)
