"""What the routes share: settings, store, keys, desk, ledger. One of them hangs on each app's state."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth.signing import Keys
from mtlsign.service.database import Database
from mtlsign.service.fetch.model_cache import ContentStore
from mtlsign.service.ledger_reader import LedgerReader
from mtlsign.service.metrics import InMemoryMetrics, Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.queue.job_queue import JobQueue
from mtlsign.service.verifier.verifier import VerifierBackend

#: What anybody may ask for is looked up once in so many seconds.
FRESH_S = 3.0
LEDGER_S = 5.0


@dataclass
class AppState:
    """All that an ingress process holds."""

    settings: ServiceSettings
    store: Database
    keys: Keys
    backend: VerifierBackend
    metrics: Metrics
    desk: JobQueue
    shelf: ContentStore
    ledger: LedgerReader | None
    #: large bodies are parsed one at a time
    heavy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _written: float = -math.inf
    _listed: tuple[float, list[dict[str, Any]]] = (-math.inf, [])

    @classmethod
    def open(
        cls, settings: ServiceSettings, backend: VerifierBackend, figures: Metrics | None = None
    ) -> AppState:
        """From settings. Raises KeyMaterialError, and Problem where the state is a newer version's."""
        store, keys = Database(settings.state / "service.sqlite"), Keys.load(settings)
        figures = figures or InMemoryMetrics()
        desk = JobQueue(settings, store, keys, backend, figures)
        ledger = LedgerReader(settings.ledger) if settings.ledger else None
        return cls(
            settings, store, keys, backend, figures, desk, ContentStore(settings.state / "uploads"), ledger
        )

    async def writable(self) -> None:
        """The file can be written to, as of a few seconds ago. Raises sqlite3.OperationalError."""
        async with self._asking:
            if time.monotonic() > self._written + FRESH_S:
                await asyncio.to_thread(self.store.try_out)
                self._written = time.monotonic()

    async def listed(self) -> list[dict[str, Any]]:
        """Public keys, and the ledger's entry of each as of a few seconds ago: None where it has none or
        cannot be read.
        """
        found = self.keys.public()
        if self.ledger is None:
            return found
        async with self._looking:
            if time.monotonic() > self._listed[0] + FRESH_S:
                names, entries = [bytes.fromhex(one["public_key"]) for one in found], {}
                with suppress(Problem, TimeoutError):
                    entries = await asyncio.wait_for(self.ledger.ask(self.ledger.first_of, names), LEDGER_S)
                found = [one | {"entry": entries.get(name)} for one, name in zip(found, names, strict=True)]
                self._listed = time.monotonic(), found
        return self._listed[1]

    def need_ledger(self) -> LedgerReader:
        """The ledger. Raises Problem `not-found` where the operator named none."""
        if self.ledger is None:
            raise Problem("not-found", "this service reads no ledger (setting ledger)")
        return self.ledger


def get_state(request: Request) -> AppState:
    """The office of the app that serves this request."""
    found: AppState = request.app.state.office
    return found
