"""SQLite database of the service: requests and their claims, results, signed verdicts, tokens and uploads.

It uses a write-ahead log with full synchronisation, so a committed answer survives a crash. A request is
leased to the process that works on it. If that process crashes, the lease expires and another process
continues the request with the outcomes stored so far.
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

FILE_NAME = "service.sqlite"
APPLICATION_ID = 0x4D544C56  # "MTLV"
VERSION = 3
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
    """One request. Its claims are stored separately, each encrypted, until they are answered."""

    id: str
    token: str
    created: float
    finished: float | None
    count: int
    digest: bytes


@dataclass(frozen=True)
class QueueLimits:
    """Limits of the unanswered claims: number and encrypted bytes, of one token and of all tokens."""

    token_claims: int
    token_bytes: int
    claims: int
    bytes: int


class Database:
    """Database file with one connection behind a lock. Other processes may open the same file."""

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
                fix = "Update mtlsign." if version > VERSION else "Use a new --state-dir."
                raise Problem("not-ready", f"The database has version {version}. {fix}")

    def close(self) -> None:
        """Close the connection."""
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
                if self._db.in_transaction:  # a full disk ends the transaction
                    self._db.execute("ROLLBACK")
                raise

    def fetch_all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def check_writable(self) -> None:
        """Write an unchanged value. Raises sqlite3.OperationalError on a full or read-only disk."""
        self.execute(f"PRAGMA user_version={VERSION}")

    def execute(self, query: str, *values: Any) -> int:
        """Run one statement and return the number of changed rows."""
        with self._write() as db:
            return db.execute(query, values).rowcount

    # requests
    def add(
        self, job: Job, encrypted: Sequence[bytes], idempotency_key: str | None, owner: str, lease: float,
        limits: QueueLimits,
    ) -> Job:  # fmt: skip
        """Store a new request, or return the stored request of the same token and idempotency key.

        Args:
            job: the new request.
            encrypted: its claims, encrypted, in order.
            idempotency_key: key chosen by the client, or None.
            owner: name of the process that works on the request.
            lease: time at which the lease expires, in seconds since the epoch.
            limits: limits of the queue.

        Raises:
            Problem: `conflicting-key` if the stored request has other claims; `busy` or `too-many-claims`.
        """
        size = sum(map(len, encrypted))
        with self._write() as db:
            stored = self.find_by_idempotency_key(job.token, idempotency_key)
            if stored is not None:
                if stored.digest != job.digest:
                    detail = "This Idempotency-Key was used with another body. Choose a new key."
                    raise Problem("conflicting-key", detail)
                return stored
            self.check_limits(job.token, job.count, size, limits)
            db.execute(
                "INSERT INTO jobs(id,token,created,count,bytes,idem,digest,owner,lease) "
                "VALUES(?,?,?,?,?,?,?,?,?)",
                (job.id, job.token, job.created, job.count, size, idempotency_key, job.digest, owner, lease),
            )
            db.executemany(
                "INSERT INTO claims(job,at,sealed) VALUES(?,?,?)",
                [(job.id, index, claim) for index, claim in enumerate(encrypted)],
            )
        return job

    def find_by_idempotency_key(self, token: str, key: str | None) -> Job | None:
        """Return the request of that token and idempotency key, if one is stored."""
        if key is None:
            return None
        rows = self.fetch_all("SELECT id FROM jobs WHERE token=? AND idem=?", token, key)
        return self.job(rows[0][0], token) if rows else None

    def check_limits(self, token: str, claims: int, size: int, limits: QueueLimits) -> None:
        """Check that further claims fit into the queue.

        Args:
            token: id of the token.
            claims: number of further claims.
            size: their encrypted size in bytes.
            limits: limits of the queue.

        Raises:
            Problem: `too-many-claims` (limits of the token) or `busy` (limits of all tokens).
        """
        query = "SELECT coalesce(sum(count),0), coalesce(sum(bytes),0) FROM jobs WHERE finished IS NULL"
        ((own_claims, own_bytes),) = self.fetch_all(f"{query} AND token=?", token)
        if own_claims + claims > limits.token_claims or own_bytes + size > limits.token_bytes:
            detail = f"{own_claims} claims of this token are waiting. Send more after they are answered."
            raise Problem("too-many-claims", detail, retry_after=5)
        ((all_claims, all_bytes),) = self.fetch_all(query)
        if all_claims + claims > limits.claims or all_bytes + size > limits.bytes:
            raise Problem("busy", "The queue is full. Try again later.", retry_after=5)

    def job(self, name: str, token: str | None) -> Job:
        """Return a request of `token` (None: of any token).

        Raises:
            Problem: `not-found`, also for a request of another token.
        """
        rows = self.fetch_all("SELECT id,token,created,finished,count,digest FROM jobs WHERE id=?", name)
        if not rows or (token is not None and rows[0][1] != token):
            raise Problem("not-found", "This token has no request of that id.")
        return Job(*rows[0])

    def encrypted_claim(self, job: str, index: int) -> bytes:
        """Return one unanswered claim, encrypted; empty if it was answered."""
        rows = self.fetch_all("SELECT sealed FROM claims WHERE job=? AND at=?", job, index)
        return rows[0][0] if rows else b""

    def outcomes(self, job: str) -> dict[int, dict[str, Any]]:
        """Return the stored outcomes of a request by claim index."""
        rows = self.fetch_all("SELECT at,outcome FROM results WHERE job=?", job)
        return {index: json.loads(text) for index, text in rows}

    def save_results(self, job: str, results: Iterable[tuple[int, dict[str, Any], bytes | None]]) -> None:
        """Store results (index, outcome, signed envelope), keep stored ones, and delete their claims."""
        rows = [
            (job, index, json.dumps(outcome, allow_nan=False), envelope)
            for index, outcome, envelope in results
        ]
        with self._write() as db:
            db.executemany("INSERT OR IGNORE INTO results(job,at,outcome,envelope) VALUES(?,?,?,?)", rows)
            db.executemany("DELETE FROM claims WHERE job=? AND at=?", [row[:2] for row in rows])

    def finish(self, job: str) -> None:
        """Mark a request as answered."""
        self.execute("UPDATE jobs SET finished=?, owner=NULL WHERE id=?", self.clock(), job)

    def envelope(self, job: str, index: int) -> bytes | None:
        """Return the signed verdict of one claim."""
        rows = self.fetch_all("SELECT envelope FROM results WHERE job=? AND at=?", job, index)
        return rows[0][0] if rows else None

    def acquire_expired(self, owner: str, lease_s: float, running: Sequence[str] = ()) -> list[Job]:
        """Lease all open requests whose lease has expired to `owner`, except those already `running`."""
        now = self.clock()
        with self._write() as db:
            rows = db.execute(
                "SELECT id FROM jobs WHERE finished IS NULL AND lease<? ORDER BY created", (now,)
            )
            names = [name for (name,) in rows.fetchall() if name not in running]
            for name in names:
                db.execute("UPDATE jobs SET owner=?, lease=? WHERE id=?", (owner, now + lease_s, name))
        return [self.job(name, None) for name in names]

    def release(self, job: str, lease: float) -> None:
        """Give up a request; any process may acquire it after the time `lease`."""
        self.execute("UPDATE jobs SET owner=NULL, lease=? WHERE id=? AND finished IS NULL", lease, job)

    def renew_leases(self, jobs: Sequence[str], lease_s: float) -> None:
        """Extend the leases of these requests to `lease_s` seconds from now."""
        end = self.clock() + lease_s
        with self._write() as db:
            query = "UPDATE jobs SET lease=? WHERE finished IS NULL AND id=?"
            db.executemany(query, [(end, job) for job in jobs])

    def is_closed(self, job: str) -> bool:
        """Return whether a request needs no further work: it was answered, or its token was revoked."""
        return not self.fetch_all("SELECT 1 FROM jobs WHERE id=? AND finished IS NULL", job)

    def waiting_claims(self) -> int:
        """Return the number of claims of all unanswered requests."""
        rows = self.fetch_all("SELECT coalesce(sum(count),0) FROM jobs WHERE finished IS NULL")
        return int(rows[0][0])

    def revoke(self, token: str) -> bool:
        """Revoke a token, end its sessions, close its open requests and delete their claims.

        Returns:
            False if there is no valid token of that id.
        """
        now = self.clock()
        with self._write() as db:
            revoked = db.execute("UPDATE tokens SET revoked=? WHERE id=? AND revoked IS NULL", (now, token))
            db.execute("DELETE FROM sessions WHERE token=?", (token,))
            db.execute("DELETE FROM claims WHERE job IN (SELECT id FROM jobs WHERE token=?)", (token,))
            db.execute("UPDATE jobs SET finished=? WHERE token=? AND finished IS NULL", (now, token))
        return bool(revoked.rowcount)

    # uploads
    def reserve_upload(self, token: str, size: int, seconds: float, quota: int) -> str:
        """Reserve space for an upload that begins; it cannot be used before `add_upload`.

        Args:
            token: id of the token.
            size: announced size in bytes.
            seconds: time after which the reservation expires.
            quota: most bytes of all uploads of the token.

        Returns:
            A ticket for `add_upload` or `cancel_upload`.

        Raises:
            Problem: `quota`.
        """
        ticket, now = secrets.token_hex(16), self.clock()
        with self._write() as db:
            used = 0
            for table in ("uploads", "incoming"):
                query = f"SELECT coalesce(sum(size),0) FROM {table} WHERE token=? AND expires>?"
                used += db.execute(query, (token, now)).fetchone()[0]
            if used + size > quota:
                detail = f"{used} of {quota} bytes are used. Wait until earlier uploads expire."
                raise Problem("quota", detail)
            db.execute("INSERT INTO incoming VALUES(?,?,?,?)", (ticket, token, size, now + seconds))
        return ticket

    def cancel_upload(self, ticket: str) -> None:
        """Delete the reservation of a failed upload."""
        self.execute("DELETE FROM incoming WHERE id=?", ticket)

    def add_upload(self, ticket: str, sha256: str, size: int, expires: float) -> None:
        """Store a complete upload; its token may use it until `expires`.

        Args:
            ticket: reservation of the upload.
            sha256: digest of the received bytes, hex.
            size: number of received bytes.
            expires: seconds since the epoch.

        Raises:
            Problem: `too-slow` if the reservation has expired.
        """
        with self._write() as db:
            rows = db.execute("DELETE FROM incoming WHERE id=? RETURNING token", (ticket,)).fetchall()
            if not rows:
                raise Problem("too-slow", "The upload took too long. Send it again.")
            values = (rows[0][0], sha256, size, expires)
            db.execute("INSERT OR REPLACE INTO uploads VALUES(?,?,?,?)", values)

    def upload(self, token: str, sha256: str) -> tuple[int, float] | None:
        """Return (size, expiry) of an upload of that token."""
        query = "SELECT size, expires FROM uploads WHERE token=? AND sha256=? AND expires>?"
        rows = self.fetch_all(query, token, sha256, self.clock())
        return (rows[0][0], rows[0][1]) if rows else None

    def delete_expired(self, retention_s: float, stored_claims: int) -> set[str]:
        """Delete expired rows, and the oldest answered requests of each token beyond `stored_claims` claims.

        Returns the digests of the files that uploads still reference.
        """
        now = self.clock()
        with self._write() as db:
            db.execute("DELETE FROM uploads WHERE expires<=?", (now,))
            db.execute("DELETE FROM incoming WHERE expires<=?", (now,))
            db.execute("DELETE FROM sessions WHERE expires<=?", (now,))
            total = "sum(count) OVER (PARTITION BY token ORDER BY created DESC, id)"
            query = (
                f"SELECT id FROM (SELECT id, finished, {total} AS total FROM jobs) "
                "WHERE finished IS NOT NULL AND (finished<? OR total>?)"
            )
            jobs = db.execute(query, (now - retention_s, stored_claims)).fetchall()
            db.executemany("DELETE FROM results WHERE job=?", jobs)
            db.executemany("DELETE FROM jobs WHERE id=?", jobs)
            return {digest for (digest,) in db.execute("SELECT DISTINCT sha256 FROM uploads")}
