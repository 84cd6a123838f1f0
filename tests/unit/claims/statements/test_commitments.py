"""Hiding commitments."""

from __future__ import annotations

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.statements import commitments
from tests.unit.claims.scenario import KIT_KEY
from tests.unit.claims.statement_examples import (
    H,
)


def test_commit_binds_kind_salt_and_every_part() -> None:
    base = commitments.commit("key", H[1], b"ab", b"c")
    others = [("key", H[1], b"a", b"bc"), ("key", H[1], b"abc"), ("keyab", H[1], b"c"),
              ("key", H[2], b"ab", b"c"), ("model", H[1], b"ab", b"c"),
              ("key", H[1], b"ab", b"c", b"")]  # fmt: skip
    assert len({base, *(commitments.commit(*other) for other in others)}) == len(others) + 1
    with pytest.raises(ValueError):
        commitments.commit("key", b"short", b"x")
    salts = {
        commitments.derive_salt(KIT_KEY, H[1], kind, context)
        for kind in ("key", "model")
        for context in (H[2], H[3])
    }
    assert len(salts) == 4 and commitments.derive_salt(KIT_KEY, H[2], "key", H[2]) not in salts
    key_commitments = [commitments.commit_key(h, h) for h in H[:5]]
    for i, commitment in enumerate(key_commitments):
        path = commitments.key_path(key_commitments, i)
        assert merkle.verify_inclusion(
            merkle.leaf_hash(commitment), i, 5, path, commitments.keys_root(key_commitments)
        )
