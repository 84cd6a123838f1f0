"""What the service must not forget, in its own SQLite file: requests until they are answered, results,
tokens, uploads, signed verdicts (WAL, full synchronisation: an answer given is an answer kept).

A request is leased to the process that works on it. When that process dies the lease runs out and another
takes the request up where it was left: every outcome is kept as it comes.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.service.problems import Problem

APPLICATION_ID = 0x4D544C56  # "MTLV"
VERSION = 2
BUSY_MS = 30_000

_SCHEMA = """
CREATE TABLE tokens(id TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, name TEXT NOT NULL, scopes TEXT NOT NULL,
                    created REAL NOT NULL, expires REAL NOT NULL, revoked REAL);
CREATE TABLE sessions(hash BLOB PRIMARY KEY, token TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs(id TEXT PRIMARY KEY, token TEXT NOT NULL, created REAL NOT NULL, finished REAL,
                  count INTEGER NOT NULL, bytes INTEGER NOT NULL, idem TEXT, digest BLOB NOT NULL,
                  owner TEXT, lease REAL NOT NULL DEFAULT 0, UNIQUE(token, idem));
CREATE INDEX open_jobs ON jobs(finished, lease);
CREATE TABLE claims(job TEXT NOT NULL, at INTEGER NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY(job, at));
CREATE TABLE results(job TEXT NOT NULL, at INTEGER NOT NULL, outcome TEXT NOT NULL, envelope BLOB,
                     PRIMARY KEY(job, at)) WITHOUT ROWID;
CREATE TABLE uploads(token TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, expires REAL NOT NULL,
                     PRIMARY KEY(token, sha256)) WITHOUT ROWID;
CREATE TABLE incoming(id TEXT PRIMARY KEY, token TEXT NOT NULL, size INTEGER NOT NULL, expires REAL NOT NULL);
"""


@dataclass(frozen=True)
class Job:
    """One request. Its claims lie beside it, each encrypted by itself, until it is answered."""

    id: str
    token: str
    created: float
    finished: float | None
    count: int
    digest: bytes


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait: claims and sealed bytes, of one token and of all together."""

    token_claims: int
    token_bytes: int
    claims: int
    bytes: int


class Database:
    """One file, one connection behind a lock; other processes may have it open too."""

    def __init__(self, path: Path, *, clock: Any = time.time) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.clock = clock
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        path.chmod(0o600)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_MS}", "secure_delete=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(None, (part.strip() for part in _SCHEMA.split(";"))):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={VERSION}")
            elif version != VERSION:
                raise Problem("not-ready", f"the service's file has version {version}; update mtlsign")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk ends it by itself
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def try_out(self) -> None:
        """Write, though nothing new. Raises sqlite3.OperationalError on a full or read-only disk."""
        self.change(f"PRAGMA user_version={VERSION}")

    def change(self, query: str, *values: Any) -> int:
        """Run one statement; number of rows it changed."""
        with self._write() as db:
            return db.execute(query, values).rowcount

    # requests
    def add(
        self, job: Job, sealed: Sequence[bytes], idem: str | None, owner: str, lease: float, room: QueueLimits
    ) -> Job:
        """Keep a new request; the same idempotency key of the same token: the request that is there.

        Raises: Problem `conflicting-key` when that one had another body; `busy` or `too-many-claims`.
        """
        size = sum(map(len, sealed))
        with self._write() as db:
            found = self.known(job.token, idem)
            if found is not None:
                if found.digest != job.digest:
                    raise Problem("conflicting-key", "this Idempotency-Key came with another body before")
                return found
            self.check_room(job.token, job.count, size, room)
            db.execute(
                "INSERT INTO jobs(id,token,created,count,bytes,idem,digest,owner,lease) "
                "VALUES(?,?,?,?,?,?,?,?,?)",
                (job.id, job.token, job.created, job.count, size, idem, job.digest, owner, lease),
            )
            db.executemany(
                "INSERT INTO claims(job,at,sealed) VALUES(?,?,?)",
                [(job.id, at, one) for at, one in enumerate(sealed)],
            )
        return job

    def known(self, token: str, idem: str | None) -> Job | None:
        """The request of that token under that idempotency key."""
        if idem is None:
            return None
        found = self.rows("SELECT id FROM jobs WHERE token=? AND idem=?", token, idem)
        return self.job(found[0][0], token) if found else None

    def check_room(self, token: str, claims: int, size: int, room: QueueLimits) -> None:
        """Raises Problem `busy` (all tokens) or `too-many-claims` (this one) when no more may wait."""
        query = "SELECT coalesce(sum(count),0), coalesce(sum(bytes),0) FROM jobs WHERE finished IS NULL"
        ((own_claims, own_bytes),) = self.rows(f"{query} AND token=?", token)
        if own_claims + claims > room.token_claims or own_bytes + size > room.token_bytes:
            detail = f"{own_claims} claims of this token are waiting; wait for answers first"
            raise Problem("too-many-claims", detail, retry_after=5)
        ((all_claims, all_bytes),) = self.rows(query)
        if all_claims + claims > room.claims or all_bytes + size > room.bytes:
            raise Problem("busy", "as much is waiting as may wait; try again later", retry_after=5)

    def job(self, name: str, token: str | None) -> Job:
        """A request of that token (None: of anybody). Raises Problem `not-found`, also for another's."""
        found = self.rows("SELECT id,token,created,finished,count,digest FROM jobs WHERE id=?", name)
        if not found or (token is not None and found[0][1] != token):
            raise Problem("not-found", "this token has no such request")
        return Job(*found[0])

    def sealed(self, job: str, at: int) -> bytes:
        """One claim of a request that is not answered, encrypted."""
        found = self.rows("SELECT sealed FROM claims WHERE job=? AND at=?", job, at)
        return found[0][0] if found else b""

    def outcomes(self, job: str) -> dict[int, dict[str, Any]]:
        """Outcomes so far, by the claims' places."""
        return {
            at: json.loads(text) for at, text in self.rows("SELECT at,outcome FROM results WHERE job=?", job)
        }

    def keep(self, job: str, found: Iterable[tuple[int, dict[str, Any], bytes | None]]) -> None:
        """Keep outcomes (place, outcome, signed envelope); the first one of a place stays. Their opened keys
        are wiped.
        """
        rows = [(job, at, json.dumps(outcome, allow_nan=False), envelope) for at, outcome, envelope in found]
        with self._write() as db:
            db.executemany("INSERT OR IGNORE INTO results(job,at,outcome,envelope) VALUES(?,?,?,?)", rows)
            db.executemany("DELETE FROM claims WHERE job=? AND at=?", [row[:2] for row in rows])

    def finish(self, job: str) -> None:
        """All claims are answered."""
        self.change("UPDATE jobs SET finished=?, owner=NULL WHERE id=?", self.clock(), job)

    def envelope(self, job: str, at: int) -> bytes | None:
        """The signed verdict of one claim."""
        found = self.rows("SELECT envelope FROM results WHERE job=? AND at=?", job, at)
        return found[0][0] if found else None

    def adopt(self, owner: str, lease: float, but: Sequence[str] = ()) -> list[Job]:
        """Take over requests whose worker's lease has run out."""
        now = self.clock()
        with self._write() as db:
            found = db.execute(
                "SELECT id FROM jobs WHERE finished IS NULL AND lease<? ORDER BY created", (now,)
            )
            names = [name for (name,) in found.fetchall() if name not in but]
            for name in names:
                db.execute("UPDATE jobs SET owner=?, lease=? WHERE id=?", (owner, now + lease, name))
        return [self.job(name, None) for name in names]

    def put_down(self, job: str, lease: float) -> None:
        """Leave a request to whoever adopts it when the lease has run out."""
        self.change("UPDATE jobs SET owner=NULL, lease=? WHERE id=? AND finished IS NULL", lease, job)

    def renew(self, jobs: Sequence[str], lease: float) -> None:
        """Say that this process still works on these."""
        end = self.clock() + lease
        with self._write() as db:
            query = "UPDATE jobs SET lease=? WHERE finished IS NULL AND id=?"
            db.executemany(query, [(end, job) for job in jobs])

    def ended(self, job: str) -> bool:
        """Whether nobody waits for it any more: answered, or its token was revoked."""
        return not self.rows("SELECT 1 FROM jobs WHERE id=? AND finished IS NULL", job)

    def waiting(self) -> int:
        """Claims of all requests not yet answered."""
        found = self.rows("SELECT coalesce(sum(count),0) FROM jobs WHERE finished IS NULL")
        return int(found[0][0])

    def revoke(self, token: str) -> bool:
        """End a token, its sessions and its open requests, whose claims are wiped; False: there is none."""
        now = self.clock()
        with self._write() as db:
            found = db.execute("UPDATE tokens SET revoked=? WHERE id=? AND revoked IS NULL", (now, token))
            db.execute("DELETE FROM sessions WHERE token=?", (token,))
            db.execute("DELETE FROM claims WHERE job IN (SELECT id FROM jobs WHERE token=?)", (token,))
            db.execute("UPDATE jobs SET finished=? WHERE token=? AND finished IS NULL", (now, token))
        return bool(found.rowcount)

    # uploads
    def reserve(self, token: str, size: int, seconds: float, quota: int) -> str:
        """Count an upload that begins; it is nobody's before `add_upload`. Returns its ticket.

        Raises: Problem `quota` when the token would have more than `quota` bytes here.
        """
        ticket, now = secrets.token_hex(16), self.clock()
        with self._write() as db:
            used = 0
            for table in ("uploads", "incoming"):
                query = f"SELECT coalesce(sum(size),0) FROM {table} WHERE token=? AND expires>?"
                used += db.execute(query, (token, now)).fetchone()[0]
            if used + size > quota:
                raise Problem("quota", f"{used} of {quota} bytes are used; wait until earlier uploads expire")
            db.execute("INSERT INTO incoming VALUES(?,?,?,?)", (ticket, token, size, now + seconds))
        return ticket

    def release(self, ticket: str) -> None:
        """Give the room of an upload back that did not end well."""
        self.change("DELETE FROM incoming WHERE id=?", ticket)

    def add_upload(self, ticket: str, sha256: str, size: int, expires: float) -> None:
        """All bytes came, of this digest: the token may use them. Raises Problem when it took too long."""
        with self._write() as db:
            found = db.execute("DELETE FROM incoming WHERE id=? RETURNING token", (ticket,)).fetchall()
            if not found:
                raise Problem("too-slow", "the upload took too long; send it again")
            values = (found[0][0], sha256, size, expires)
            db.execute("INSERT OR REPLACE INTO uploads VALUES(?,?,?,?)", values)

    def upload(self, token: str, sha256: str) -> tuple[int, float] | None:
        """(size, expiry) of an upload of that token."""
        query = "SELECT size, expires FROM uploads WHERE token=? AND sha256=? AND expires>?"
        found = self.rows(query, token, sha256, self.clock())
        return (found[0][0], found[0][1]) if found else None

    def clean(self, keep_s: float) -> set[str]:
        """Drop what has expired; returns the digests of the files that uploads still need."""
        now = self.clock()
        with self._write() as db:
            db.execute("DELETE FROM uploads WHERE expires<=?", (now,))
            db.execute("DELETE FROM incoming WHERE expires<=?", (now,))
            db.execute("DELETE FROM sessions WHERE expires<=?", (now,))
            old = "SELECT id FROM jobs WHERE finished IS NOT NULL AND finished<?"
            db.execute(f"DELETE FROM results WHERE job IN ({old})", (now - keep_s,))
            db.execute("DELETE FROM jobs WHERE finished IS NOT NULL AND finished<?", (now - keep_s,))
            return {d for (d,) in db.execute("SELECT DISTINCT sha256 FROM uploads")}
