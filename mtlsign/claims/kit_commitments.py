"""Commitments to the kits of one marked model, derived from identity, kits and the publication's nonce."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Publish
from mtlsign.errors import ClaimError, KeyMaterialError
from mtlsign.watermark.keys.identity import Identity

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit


class KitCommitments:
    """Keys, heads and marked model of an owner's kits, and the commitments to them.

    Args:
        identity: owner of the kits.
        kits: kits of one model, in the order in which their keys will be opened.

    Raises:
        KeyMaterialError: a kit is damaged or belongs to another identity.
        ClaimError: there is no kit, two kits have the same key, or the kits are for different models.
    """

    def __init__(self, identity: Identity, kits: Sequence[OwnerKit]) -> None:
        self.identity, self.kits = identity, tuple(kits)
        self.keys = _keys(identity, kits)
        self.heads: tuple[bytes | None, ...] = tuple(
            None if kit.head is None else hashlib.sha256(kit.head).digest() for kit in kits
        )
        self.model_digest = model_digest(kits)

    def keys_root(self, nonce: bytes) -> bytes:
        """Return the Merkle root over the key commitments of a publication with this nonce."""
        return commitments.keys_root(self._key_commitments(nonce))

    def heads_commitment(self, nonce: bytes) -> bytes:
        """Return the commitment to the heads of a publication with this nonce."""
        salt = commitment_salt(self.identity, nonce, "head")
        return commitments.commit_heads(salt, self.identity.public_key, self.heads)

    def model_commitment(self, nonce: bytes) -> bytes:
        """Return the commitment to the marked model of a publication with this nonce."""
        return model_commitment(self.identity, nonce, self.model_digest)

    def key_salt(self, nonce: bytes, index: int) -> bytes:
        """Return the salt that opens key number `index`."""
        return commitment_salt(self.identity, nonce, "key", self.keys[index])

    def key_path(self, nonce: bytes, index: int) -> tuple[bytes, ...]:
        """Return the inclusion path of key number `index` under `keys_root(nonce)`."""
        return tuple(commitments.key_path(self._key_commitments(nonce), index))

    def matches(self, publication: Publish) -> bool:
        """Return whether a publication commits to these kits in this order."""
        return (
            publication.signer == self.identity.public_key
            and publication.keys_count == len(self.keys)
            and publication.keys_root == self.keys_root(publication.nonce)
            and publication.model == self.model_commitment(publication.nonce)
        )

    def _key_commitments(self, nonce: bytes) -> list[bytes]:
        return [commitments.commit_key(self.key_salt(nonce, i), key) for i, key in enumerate(self.keys)]


def commitment_salt(identity: Identity, nonce: bytes, kind: str, *context: bytes) -> bytes:
    """Return the salt of one commitment of a publication.

    Args:
        identity: author of the publication.
        nonce: nonce of the publication, 32 bytes.
        kind: "key", "head" or "model".
        context: the watermark key for the kind "key".
    """
    return commitments.derive_salt(identity.kit_key, nonce, kind, *context)


def model_commitment(identity: Identity, nonce: bytes, digest: bytes) -> bytes:
    """Return the author's commitment to a model.

    Args:
        identity: author of the publication.
        nonce: nonce of the publication, 32 bytes.
        digest: SHA-256 of the model.
    """
    return commitments.commit_model(commitment_salt(identity, nonce, "model"), identity.public_key, digest)


def model_digest(kits: Sequence[OwnerKit]) -> bytes:
    """Return the SHA-256 of the marked model of the kits.

    Raises:
        ClaimError: the kits are for different models.
        KeyMaterialError: a kit has no model digest.
    """
    digests = {str(kit.info.get("model_digest")) for kit in kits}
    if len(digests) != 1:
        raise ClaimError("The kits are for different models. Publish each model separately.", field="kit")
    try:
        digest = bytes.fromhex(digests.pop())
        if len(digest) != 32:
            raise ValueError
    except ValueError:
        raise KeyMaterialError("The kit has no model digest. Pass the kit unchanged.", field="kit") from None
    return digest


def _keys(identity: Identity, kits: Sequence[OwnerKit]) -> list[bytes]:
    if not kits:
        raise ClaimError("No kit is given. Pass at least one.", field="kit")
    keys = []
    for kit in kits:
        if kit.opening.public_key != identity.public_key:
            raise KeyMaterialError("The kit belongs to another identity. Pass its --owner.", field="kit")
        keys.append(kit.opening.key())
    if len(set(keys)) != len(keys):
        raise ClaimError("Two kits have the same key. Pass different kits.", field="kit")
    return keys
