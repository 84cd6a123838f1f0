"""SQLite ledger: durability, proofs and triggers."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.rebuild import verify_stored_tree
from mtlsign.claims.ledger.sqlite import SqliteLedger
from mtlsign.errors import LedgerError
from tests.unit.claims.scenario import ClaimScenario


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


def test_sqlite_ledger_copied_without_its_wal_has_every_entry(tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path}/l.db", create=True)
    for i in range(3):
        ledger.append(b"entry %d" % i)
    shutil.copy(tmp_path / "l.db", tmp_path / "copy.db")  # while the ledger is open
    with open_ledger(f"sqlite:///{tmp_path}/copy.db") as copied:
        assert copied.size() == 3
        verify_stored_tree(copied)


def test_sqlite_ledger_with_cosignature_of_negative_size_is_read_without_it(scenario: ClaimScenario) -> None:
    """One flipped bit of the file makes such a row, and anyone who can write the file."""
    view = scenario.cosign_all()
    with closing(sqlite3.connect(scenario.ledger_path)) as database:
        database.execute(
            "INSERT INTO cosignatures (size, root, line) SELECT -size, root, line FROM cosignatures"
        )
        database.commit()
    damaged = scenario.view()
    assert damaged.confirmed == view.confirmed and view.confirmed


@contextmanager
def without_write_permission(folder: Path) -> Iterator[None]:
    """Make a folder read-only for this process, which may be root."""
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_sqlite_ledger_in_read_only_folder_can_be_checked_and_not_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, uri = Path(name), f"sqlite:///{name}/l.db"
        with open_ledger(uri, create=True) as ledger:
            for i in range(3):
                ledger.append(b"entry %d" % i)
        with without_write_permission(folder), open_ledger(uri) as auditor:
            assert verify_stored_tree(auditor).size == 3
            with pytest.raises(LedgerError, match="Check that the file is writable"):
                auditor.append(b"new")


def test_sqlite_ledger_in_read_only_folder_with_wal_names_the_remedy() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, uri = Path(name), f"sqlite:///{name}/l.db"
        with open_ledger(uri, create=True) as ledger:
            ledger.append(b"entry")
        (folder / "l.db-wal").write_bytes(b"further entries")
        with without_write_permission(folder), pytest.raises(LedgerError, match="Copy both files"):
            open_ledger(uri)
