"""Manipulations of a SQLite ledger that the owner of its file can make."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from mtlsign.claims import merkle
from tests.unit.claims.scenario import ClaimScenario


def execute_without_triggers(scenario: ClaimScenario, *statements: str) -> None:
    """Drop the append-only triggers and execute SQL statements."""
    with closing(sqlite3.connect(scenario.ledger_path)) as db, db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)


def rewrite_entries(scenario: ClaimScenario, rows: list[bytes]) -> None:
    """Replace all entries and the tree of the ledger; co-signatures remain."""
    execute_without_triggers(scenario, "DELETE FROM entries", "DELETE FROM nodes")
    with closing(sqlite3.connect(scenario.ledger_path)) as db, db:
        tree = merkle.CompactRange()
        for index, row in enumerate(rows):
            db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, merkle.leaf_hash(row), row))
            db.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(merkle.leaf_hash(row)))


def delete_ledger_file(scenario: ClaimScenario) -> None:
    """Close the ledger and delete its file."""
    scenario.ledger.close()
    path = scenario.ledger_path
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def dump_sql(scenario: ClaimScenario, target: str) -> None:
    """Copy the SQLite ledger to the file `target`."""
    scenario.ledger._db.execute("VACUUM INTO ?", (target,))  # type: ignore[attr-defined]
