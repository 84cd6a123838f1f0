"""SQLite ledger: durability, proofs and triggers."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.rebuild import verify_stored_tree
from mtlsign.claims.ledger.sqlite import SqliteLedger


def test_sqlite_ledger_appends_entries_once_and_proves_them(tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/sub/l.db", create=True)
    rows = [b"row %d" % i for i in range(300)]
    assert isinstance(ledger, SqliteLedger)
    assert ledger.append_many(rows[:200]) == list(range(200))
    assert [ledger.append(row) for row in rows[195:210]] == list(range(195, 210))
    reopened = open_ledger(ledger.uri)
    assert list(reopened.scan()) == rows[:210] and reopened.size() == 210 and list(reopened.scan(250)) == []
    for size in (1, 64, 65, 210):
        head = reopened.checkpoint(size) if size else None
        for index in range(0, size, 13):
            path = reopened.prove(index, size)
            assert head and merkle.verify_inclusion(
                merkle.leaf_hash(rows[index]), index, size, path, head.root
            )
    assert verify_stored_tree(reopened).root == merkle.root_from_leaves(
        merkle.leaf_hash(row) for row in rows[:210]
    )
    for statement in (
        "UPDATE entries SET envelope = 'x' WHERE idx = 1",
        "DELETE FROM entries WHERE idx = 209",
        "INSERT OR REPLACE INTO entries VALUES (3, x'00', x'00')",
        "INSERT INTO entries VALUES (300, x'01', x'00')",
        "REPLACE INTO nodes VALUES (0, 0, x'00')",
        "DELETE FROM nodes",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            reopened._db.execute(statement)  # type: ignore[attr-defined]
    verify_stored_tree(reopened)
