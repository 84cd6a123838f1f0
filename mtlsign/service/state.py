"""Shared state of the routes of one process: settings, database, keys, queue, uploads and ledger."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth.signing import ServiceKeys
from mtlsign.service.database import FILE_NAME, Database
from mtlsign.service.fetch.content_store import ContentStore
from mtlsign.service.ledger_reader import LedgerReader
from mtlsign.service.metrics import InMemoryMetrics, Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.queue.job_queue import JobQueue
from mtlsign.service.verifier.verifier import VerifierBackend

#: Answers to unauthenticated requests are computed at most once in this many seconds.
FRESH_S = 3.0
LEDGER_TIMEOUT_S = 5.0


@dataclass
class AppState:
    """State of an ingress process."""

    settings: ServiceSettings
    database: Database
    keys: ServiceKeys
    backend: VerifierBackend
    metrics: Metrics
    queue: JobQueue
    uploads: ContentStore
    ledger: LedgerReader | None
    #: limits parsing to one large body at a time
    large_body_lock: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _ledger_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _written_at: float = -math.inf
    _cached_keys: tuple[float, list[dict[str, Any]]] = (-math.inf, [])

    @classmethod
    def open(
        cls, settings: ServiceSettings, backend: VerifierBackend, recorder: Metrics | None = None
    ) -> AppState:
        """Open the state of a process.

        Args:
            settings: settings of the service.
            backend: verifiers.
            recorder: destination of the metrics; None: memory.

        Raises:
            KeyMaterialError: an identity cannot be read.
            Problem: `not-ready` if the database has another version.
        """
        database, keys = Database(settings.state_dir / FILE_NAME), ServiceKeys.load(settings)
        recorder = recorder or InMemoryMetrics()
        queue = JobQueue(settings, database, keys, backend, recorder)
        uploads = ContentStore(settings.state_dir / "uploads")
        ledger = LedgerReader(settings.ledger) if settings.ledger else None
        return cls(settings, database, keys, backend, recorder, queue, uploads, ledger)

    async def check_writable(self) -> None:
        """Check at most once in `FRESH_S` that the database is writable. Raises sqlite3.OperationalError."""
        async with self._write_lock:
            if time.monotonic() > self._written_at + FRESH_S:
                await asyncio.to_thread(self.database.check_writable)
                self._written_at = time.monotonic()

    async def signing_keys(self) -> list[dict[str, Any]]:
        """Return the public keys with the ledger entry of each, at most `FRESH_S` old.

        The entry is None if the ledger does not contain the key or cannot be read.
        """
        keys = self.keys.public_keys()
        if self.ledger is None:
            return keys
        async with self._ledger_lock:
            if time.monotonic() > self._cached_keys[0] + FRESH_S:
                names, entries = [bytes.fromhex(key["public_key"]) for key in keys], {}
                with suppress(Problem, TimeoutError):
                    lookup = self.ledger.run(self.ledger.first_entry_of_key, names)
                    entries = await asyncio.wait_for(lookup, LEDGER_TIMEOUT_S)
                keys = [key | {"entry": entries.get(name)} for key, name in zip(keys, names, strict=True)]
                self._cached_keys = time.monotonic(), keys
        return self._cached_keys[1]

    def require_ledger(self) -> LedgerReader:
        """Return the ledger. Raises Problem `not-found` if the operator has set none."""
        if self.ledger is None:
            raise Problem("not-found", "This service reads no ledger. The operator can set ledger.")
        return self.ledger


def get_state(request: Request) -> AppState:
    """Return the state of the app that serves this request."""
    state: AppState = request.app.state.service
    return state
