"""Embedded ledger: one SQLite file in WAL mode with full synchronisation, append-only by triggers.

Each write is copied from the WAL to the file at once, so a copy of the file alone holds every entry. A file
or folder that is not writable is opened for reading only.

Triggers prevent mistakes only. The owner of the file can rewrite it; therefore a claim on a ledger without
other co-signers has the standing `self_attested`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger, ReadConsistency, check_size
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature, parse_line
from mtlsign.errors import ClaimError, LedgerError
from mtlsign.storage.versions import PUBLISH_AGAIN

APPLICATION_ID = 0x4D544C53  # "MTLS"
USER_VERSION = 2
_OLD_USER_VERSION = 1
BUSY_MS = 30_000
_PAGE = 256
_NOT_WRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)

_SCHEMA = """
CREATE TABLE entries(idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL UNIQUE, envelope BLOB NOT NULL);
CREATE TABLE nodes(level INTEGER, idx INTEGER, hash BLOB NOT NULL, PRIMARY KEY(level, idx)) WITHOUT ROWID;
CREATE TABLE cosignatures(size INTEGER, root BLOB, line TEXT, PRIMARY KEY(size, root, line)) WITHOUT ROWID;
CREATE TRIGGER next_entry BEFORE INSERT ON entries
WHEN NEW.idx IS NOT (SELECT coalesce(max(idx), -1) + 1 FROM entries)
BEGIN SELECT RAISE(ABORT, 'entries are appended one by one'); END;
CREATE TRIGGER new_node BEFORE INSERT ON nodes
WHEN EXISTS (SELECT 1 FROM nodes WHERE level = NEW.level AND idx = NEW.idx)
BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
_SCHEMA += "".join(
    f"CREATE TRIGGER no_{action}_{table} BEFORE {action} ON {table} "
    "BEGIN SELECT RAISE(ABORT, 'append-only'); END;\n"
    for table in ("entries", "nodes", "cosignatures")
    for action in ("UPDATE", "DELETE")
)


class SqliteLedger(Ledger):
    """Ledger in one file. Processes of one machine can use it concurrently; threads share one object."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the file, or create it if `create` is set. Raises LedgerError if it is not a ledger."""
        self.path = Path(os.path.abspath(path))
        self.uri = f"sqlite:///{self.path}"
        if not create and not self.path.is_file():
            raise LedgerError(
                f"{self.path} does not exist. Create it with jobs/ledger.py create, or correct the path.",
                field="ledger",
            )
        self._lock = threading.RLock()
        with self._guard():
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._connect(create)

    def _connect(self, create: bool) -> sqlite3.Connection:
        """Open the file for writing if possible, otherwise for reading."""
        try:
            return self._open("rwc" if create else "rw", create=create)
        except sqlite3.OperationalError as error:
            if create or error.sqlite_errorcode & 0xFF not in _NOT_WRITABLE:
                raise
        try:
            return self._open("ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _NOT_WRITABLE:
                raise
        wal = self.path.with_name(self.path.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise LedgerError(
                f"{self.path} cannot be read in this folder, because {wal.name} holds further entries. Copy "
                "both files to a writable folder.",
                field="ledger",
            )
        return self._open("ro&immutable=1")  # without a WAL the file is complete

    def _open(self, mode: str, *, create: bool = False) -> sqlite3.Connection:
        db = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode={mode}", uri=True, timeout=BUSY_MS / 1000,
            isolation_level=None, check_same_thread=False,
        )  # fmt: skip
        try:
            self._set_up(db, create, is_writable=not mode.startswith("ro"))
        except BaseException:
            db.close()
            raise
        return db

    def _set_up(self, db: sqlite3.Connection, create: bool, is_writable: bool) -> None:
        db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal" and is_writable:
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        if create:
            self._db = db
            with self._writing():
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    for statement in _statements(_SCHEMA):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {USER_VERSION}")
        versions = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if versions == [APPLICATION_ID, _OLD_USER_VERSION]:
            raise LedgerError(
                f"{self.path} is a ledger of version 0, which this release does not read. {PUBLISH_AGAIN}",
                field="ledger",
            )
        if versions != [APPLICATION_ID, USER_VERSION]:
            raise LedgerError(
                f"{self.path} is not a ledger of this version. Correct the path.", field="ledger"
            )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"{self.path}: {error}. Check that the file is writable, that its disk has free space, and "
                "that no other process locks it.",
                field="ledger",
            ) from None
        except OSError as error:
            raise LedgerError(
                f"{self.path}: {error.strerror}. Use a writable location.", field="ledger"
            ) from None
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self.path}: {error}. Correct the path, or restore the file from a copy.", field="ledger"
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        with suppress(sqlite3.OperationalError):  # a reader may delay it until the next write
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def append(self, envelope: bytes) -> int:  # noqa: D102
        return self.append_many([envelope])[0]

    def append_many(self, envelopes: Iterable[bytes]) -> list[int]:
        """Add several entries in one transaction and return their indices."""
        with self._guard(), self._writing():
            tree, indices = self.tree_state(), []
            for envelope in envelopes:
                check_size(envelope)
                leaf = merkle.leaf_hash(envelope)
                row = self._db.execute("SELECT idx FROM entries WHERE leaf = ?", (leaf,)).fetchone()
                if row is not None:
                    indices.append(int(row[0]))
                    continue
                index = tree.size
                self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, leaf, envelope))
                self._db.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(leaf))
                indices.append(index)
        return indices

    def tree_state(self) -> merkle.CompactRange:  # noqa: D102
        size = self.size()
        levels = [level for level in range(size.bit_length() - 1, -1, -1) if size >> level & 1]
        return merkle.CompactRange(size, [self.node(level, (size >> level) - 1) for level in levels])

    def get(self, index: int) -> bytes:  # noqa: D102
        with self._guard():
            row = self._db.execute("SELECT leaf, envelope FROM entries WHERE idx = ?", (index,)).fetchone()
        if row is None:
            raise LedgerError(
                f"The ledger has no entry {index}. Pass an index up to {self.size() - 1}.", field="ledger"
            )
        return _checked(index, *row)

    def find(self, leaf: bytes) -> int | None:  # noqa: D102
        with self._guard():
            row = self._db.execute("SELECT idx FROM entries WHERE leaf = ?", (leaf,)).fetchone()
        return None if row is None else int(row[0])

    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:  # noqa: D102
        end = self.size() if stop is None else stop
        query = "SELECT idx, leaf, envelope FROM entries WHERE idx >= ? AND idx < ? ORDER BY idx"
        while start < end:
            with self._guard():
                rows = self._db.execute(query, (start, min(start + _PAGE, end))).fetchall()
            if not rows:
                raise _missing_entry_error(start)
            for index, leaf, envelope in rows:
                if index != start:
                    raise _missing_entry_error(start)
                start += 1
                yield _checked(index, leaf, envelope)

    def size(self) -> int:  # noqa: D102
        with self._guard():
            return int(self._db.execute("SELECT coalesce(max(idx), -1) + 1 FROM entries").fetchone()[0])

    def node(self, level: int, index: int) -> bytes:  # noqa: D102
        with self._guard():
            row = self._db.execute(
                "SELECT hash FROM nodes WHERE level = ? AND idx = ?", (level, index)
            ).fetchone()
        if row is None or len(_blob(row[0])) != 32:
            raise LedgerError(
                f"The stored tree lacks node {level}/{index}. Restore the ledger from a copy.", field="ledger"
            )
        return _blob(row[0])

    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:  # noqa: D102
        query = "SELECT idx, hash FROM nodes WHERE level = ? AND idx >= ? AND idx < ? ORDER BY idx"
        with self._guard():
            rows = self._db.execute(query, (level, start, stop)).fetchall()
        if [index for index, _ in rows] != list(range(start, stop)):
            raise LedgerError(
                f"The stored tree lacks nodes of level {level}. Restore the ledger from a copy.",
                field="ledger",
            )
        return [_blob(digest) for _, digest in rows]

    def store_cosignature(self, checkpoint: Checkpoint, line: Cosignature) -> None:  # noqa: D102
        row = (checkpoint.size, checkpoint.root, line.to_line())
        with self._guard(), self._writing():
            self._db.execute("INSERT OR IGNORE INTO cosignatures VALUES (?, ?, ?)", row)

    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:  # noqa: D102
        with self._guard():
            rows = self._db.execute(
                "SELECT size, root, line FROM cosignatures ORDER BY size, root, line"
            ).fetchall()
        cosignatures = []
        for size, root, line in rows:
            try:  # a malformed row cannot be a member's co-signature, so it is skipped
                cosignatures.append((Checkpoint(origin, int(size), _blob(root)), parse_line(str(line))))
            except (ClaimError, ValueError, OverflowError):
                continue
        return cosignatures

    def staleness(self) -> ReadConsistency:  # noqa: D102
        return ReadConsistency(True, "The answer was read from the local file.")

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._db.close()


def _statements(schema: str) -> Iterator[str]:
    """Yield the statements of the schema (`executescript` would commit the open transaction)."""
    pending = ""
    for line in schema.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _checked(index: int, leaf: object, envelope: object) -> bytes:
    data = _blob(envelope)
    if merkle.leaf_hash(data) != leaf:
        raise LedgerError(
            f"Entry {index} does not match its stored hash. Restore the ledger from a copy.", field="ledger"
        )
    return data


def _missing_entry_error(index: int) -> LedgerError:
    return LedgerError(
        f"Entry {index} is missing: it was deleted or damaged. Restore the ledger from a copy.",
        field="ledger",
    )


def _blob(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
