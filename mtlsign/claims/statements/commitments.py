"""Hiding commitments: hashes of secret things that say nothing until their salt is shown.

    hide(kind, salt, part…) = SHA-256( lp("mtlsign/v0/hiding/" ‖ kind) ‖ lp(salt) ‖ lp(part) … )

The author's public key is a part (of a key it is one already): a commitment copied by somebody else opens for
nobody, also after its salt was shown.

Salts are 32 bytes. An owner derives them from the identity's kit key and the publication's random nonce, so
that identity and kit are all that a claim will need, and nothing else has to be kept (or can be lost).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mtlsign.claims import merkle
from mtlsign.watermark.keys.identity import length_prefixed

SALT = 32
KEYED = b"keyed"
"""What stands for the head of a kit whose head is derived from the key."""


def commit(kind: str, salt: bytes, *parts: bytes) -> bytes:
    """The commitment, 32 bytes; `salt` has 32."""
    if len(salt) != SALT:
        raise ValueError("a salt has 32 bytes")
    whole = (
        length_prefixed(b"mtlsign/v0/hiding/" + kind.encode())
        + length_prefixed(salt)
        + b"".join(map(length_prefixed, parts))
    )
    return hashlib.sha256(whole).digest()


def derive_salt(kit_key: bytes, nonce: bytes, kind: str, *about: bytes) -> bytes:
    """The owner's salt for one commitment: HKDF-SHA256(kit key, salt = nonce, info = kind and what it is
    about).
    """
    info = length_prefixed(b"mtlsign/v0/salt/" + kind.encode()) + b"".join(map(length_prefixed, about))
    return HKDF(hashes.SHA256(), SALT, nonce, info).derive(kit_key)


def commit_key(salt: bytes, key: bytes) -> bytes:
    """hash(key) of the paper."""
    return commit("key", salt, key)


def commit_heads(salt: bytes, author: bytes, heads: Sequence[bytes | None]) -> bytes:
    """hash(c_WM) of the paper: SHA-256 of each key's free head, None for a head derived from its key."""
    return commit("head", salt, author, *(KEYED if head is None else head for head in heads))


def commit_model(salt: bytes, author: bytes, digest: bytes) -> bytes:
    """The marked model, by its digest."""
    return commit("model", salt, author, digest)


def keys_root(hidden: Sequence[bytes]) -> bytes:
    """Merkle root over the hidden keys, in the order in which they will be opened."""
    return merkle.root_from_leaves(merkle.leaf_hash(one) for one in hidden)


def key_path(hidden: Sequence[bytes], index: int) -> list[bytes]:
    """Inclusion path of hidden key `index`."""
    tree, nodes = merkle.CompactRange(), {}
    for one in hidden:
        nodes.update({(level, i): h for level, i, h in tree.append(merkle.leaf_hash(one))})
    return merkle.inclusion_path(lambda level, i: nodes[level, i], index, len(hidden))
