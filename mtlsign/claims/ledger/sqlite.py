"""The embedded ledger: one SQLite file in WAL mode with full synchronisation, append-only by triggers.

Triggers stop mistakes, not the owner of the file: who holds it can rewrite it all, so a ledger that nobody
else co-signs is `self-attested`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger, ReadConsistency, check_size
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature, parse_line
from mtlsign.errors import ClaimError, LedgerError

APPLICATION_ID = 0x4D544C53  # "MTLS"
USER_VERSION = 1
BUSY_MS = 30_000
_PAGE = 256

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
    """A ledger in one file; many processes of one machine may use it at once, threads share one object."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open, or with `create` make, the file. Raises LedgerError for what is no ledger of ours."""
        self.path = Path(os.path.abspath(path))
        self.uri = f"sqlite:///{self.path}"
        if not create and not self.path.is_file():
            raise LedgerError(
                f"{self.path} is not there; found one with jobs/ledger.py found, or mend the path",
                field="ledger",
            )
        self._lock = threading.RLock()
        with self._guard():
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up(create)
            except BaseException:
                self._db.close()
                raise

    def _set_up(self, create: bool) -> None:
        db = self._db
        db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        if create:
            with self._writing():
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                    for statement in _statements(_SCHEMA):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {USER_VERSION}")
        found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found != [APPLICATION_ID, USER_VERSION]:
            raise LedgerError(f"{self.path} is no ledger of this version; mend the path", field="ledger")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"{self.path}: {error}; check that the file is yours to write, its disk has room, and nobody "
                "holds it",
                field="ledger",
            ) from None
        except OSError as error:
            raise LedgerError(
                f"{self.path}: {error.strerror}; name a place that you can write", field="ledger"
            ) from None
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self.path}: {error}; mend the path, or restore it from a copy", field="ledger"
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

    def append(self, envelope: bytes) -> int:  # noqa: D102
        return self.append_many([envelope])[0]

    def append_many(self, envelopes: Iterable[bytes]) -> list[int]:
        """Add many entries in one transaction: all of them or none."""
        with self._guard(), self._writing():
            tree, found = self.state(), []
            for envelope in envelopes:
                check_size(envelope)
                leaf = merkle.leaf_hash(envelope)
                row = self._db.execute("SELECT idx FROM entries WHERE leaf = ?", (leaf,)).fetchone()
                if row is not None:
                    found.append(int(row[0]))
                    continue
                index = tree.size
                self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, leaf, envelope))
                self._db.executemany("INSERT INTO nodes VALUES (?, ?, ?)", tree.append(leaf))
                found.append(index)
        return found

    def state(self) -> merkle.CompactRange:  # noqa: D102
        size = self.size()
        levels = [level for level in range(size.bit_length() - 1, -1, -1) if size >> level & 1]
        return merkle.CompactRange(size, [self.node(level, (size >> level) - 1) for level in levels])

    def get(self, index: int) -> bytes:  # noqa: D102
        with self._guard():
            row = self._db.execute("SELECT leaf, envelope FROM entries WHERE idx = ?", (index,)).fetchone()
        if row is None:
            raise LedgerError(f"has no entry {index}; it ends at {self.size() - 1}", field="ledger")
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
                raise LedgerError(f"entry {start} is missing: it was cut or damaged", field="ledger")
            for index, leaf, envelope in rows:
                if index != start:
                    raise LedgerError(f"entry {start} is missing: it was cut or damaged", field="ledger")
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
            raise LedgerError(f"the stored tree lacks node {level}/{index}; restore a copy", field="ledger")
        return _blob(row[0])

    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:  # noqa: D102
        query = "SELECT idx, hash FROM nodes WHERE level = ? AND idx >= ? AND idx < ? ORDER BY idx"
        with self._guard():
            rows = self._db.execute(query, (level, start, stop)).fetchall()
        if [index for index, _ in rows] != list(range(start, stop)):
            raise LedgerError(f"the stored tree lacks nodes of level {level}; restore a copy", field="ledger")
        return [_blob(found) for _, found in rows]

    def cosign(self, head: Checkpoint, line: Cosignature) -> None:  # noqa: D102
        row = (head.size, head.root, line.line())
        with self._guard(), self._writing():
            self._db.execute("INSERT OR IGNORE INTO cosignatures VALUES (?, ?, ?)", row)

    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:  # noqa: D102
        with self._guard():
            rows = self._db.execute(
                "SELECT size, root, line FROM cosignatures ORDER BY size, root, line"
            ).fetchall()
        found = []
        for size, root, line in rows:
            try:  # what does not parse is nobody's co-signature
                found.append((Checkpoint(origin, int(size), _blob(root)), parse_line(str(line))))
            except (ClaimError, ValueError, OverflowError):
                continue
        return found

    def freshness(self) -> ReadConsistency:  # noqa: D102
        return ReadConsistency(True, "read from the one local file")

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._db.close()


def _statements(schema: str) -> Iterator[str]:
    """The schema's statements one by one (`executescript` would commit our transaction)."""
    pending = ""
    for line in schema.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _checked(index: int, leaf: object, envelope: object) -> bytes:
    found = _blob(envelope)
    if merkle.leaf_hash(found) != leaf:
        raise LedgerError(f"entry {index} does not have the hash it is stored under", field="ledger")
    return found


def _blob(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
