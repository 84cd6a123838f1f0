"""Hiding commitments: salted hashes that reveal nothing about their content until the salt is opened.

    commit(kind, salt, part…) = SHA-256( lp("mtlsign/v1/hiding/" ‖ kind) ‖ lp(salt) ‖ lp(part) … )

The author's public key is one of the parts (a watermark key already contains it). A commitment copied by
another party therefore cannot be opened under that party's name, even after the salt is public.

Salts are 32 bytes. The owner derives them from the identity's kit key and the random nonce of the
publication. A claim thus needs only identity and kit, and no further secret has to be stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mtlsign.claims import merkle
from mtlsign.watermark.keys.identity import length_prefixed

SALT_BYTES = 32
KEYED = b"keyed"
"""Placeholder for the head of a kit whose head is derived from its key."""


def commit(kind: str, salt: bytes, *parts: bytes) -> bytes:
    """Return the commitment to `parts`, 32 bytes.

    Args:
        kind: domain of the commitment: "key", "head" or "model".
        salt: 32 bytes.
        parts: the committed byte strings, in order.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError("a salt has 32 bytes")
    message = (
        length_prefixed(b"mtlsign/v1/hiding/" + kind.encode())
        + length_prefixed(salt)
        + b"".join(map(length_prefixed, parts))
    )
    return hashlib.sha256(message).digest()


def derive_salt(kit_key: bytes, nonce: bytes, kind: str, *context: bytes) -> bytes:
    """Return the owner's salt of one commitment, 32 bytes: HKDF-SHA256 with the nonce as its salt.

    Args:
        kit_key: the identity's kit key, 32 bytes.
        nonce: the publication's nonce, 32 bytes.
        kind: domain of the commitment, as in `commit`.
        context: public parts that distinguish commitments of one kind, for example the watermark key.
    """
    info = length_prefixed(b"mtlsign/v1/salt/" + kind.encode()) + b"".join(map(length_prefixed, context))
    return HKDF(hashes.SHA256(), SALT_BYTES, nonce, info).derive(kit_key)


def commit_key(salt: bytes, key: bytes) -> bytes:
    """Return the commitment to a watermark key: hash(key) of the paper."""
    return commit("key", salt, key)


def commit_heads(salt: bytes, author: bytes, heads: Sequence[bytes | None]) -> bytes:
    """Return the commitment to the watermark heads: hash(c_WM) of the paper.

    Args:
        salt: 32 bytes.
        author: public key of the author, 32 bytes.
        heads: for each key the SHA-256 of its trained head, or None for a head derived from the key.
    """
    return commit("head", salt, author, *(KEYED if head is None else head for head in heads))


def commit_model(salt: bytes, author: bytes, digest: bytes) -> bytes:
    """Return the commitment to the marked model.

    Args:
        salt: 32 bytes.
        author: public key of the author, 32 bytes.
        digest: SHA-256 of the model's safetensors bytes.
    """
    return commit("model", salt, author, digest)


def keys_root(key_commitments: Sequence[bytes]) -> bytes:
    """Return the Merkle root over key commitments, in the order in which the keys will be opened."""
    return merkle.root_from_leaves(merkle.leaf_hash(commitment) for commitment in key_commitments)


def key_path(key_commitments: Sequence[bytes], index: int) -> list[bytes]:
    """Return the inclusion path of key commitment number `index`."""
    tree, nodes = merkle.CompactRange(), {}
    for commitment in key_commitments:
        nodes.update({(level, i): h for level, i, h in tree.append(merkle.leaf_hash(commitment))})
    return merkle.inclusion_path(lambda level, i: nodes[level, i], index, len(key_commitments))
