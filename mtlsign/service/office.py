"""What the routes share: settings, store, keys, desk, ledger. One of them hangs on each app's state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from mtlsign.service.desk import Desk
from mtlsign.service.files import Shelf
from mtlsign.service.ledgers import LedgerDesk
from mtlsign.service.metrics import Kept, Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.signing import Keys
from mtlsign.service.store import Store
from mtlsign.service.verifier import Backend
from mtlsign.settings_service import ServiceSettings


@dataclass
class Office:
    """All that an ingress process holds."""

    s: ServiceSettings
    store: Store
    keys: Keys
    backend: Backend
    metrics: Metrics
    desk: Desk
    shelf: Shelf
    ledger: LedgerDesk | None
    #: large bodies are parsed one at a time
    heavy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    @classmethod
    def open(cls, s: ServiceSettings, backend: Backend, figures: Metrics | None = None) -> Office:
        """From settings. Raises KeyMaterialError, and Problem where the state is a newer version's."""
        store, keys = Store(s.state / "service.sqlite"), Keys.load(s)
        figures = figures or Kept()
        desk = Desk(s, store, keys, backend, figures)
        ledger = LedgerDesk(s.ledger) if s.ledger else None
        return cls(s, store, keys, backend, figures, desk, Shelf(s.state / "uploads"), ledger)

    def need_ledger(self) -> LedgerDesk:
        """The ledger. Raises Problem `not-found` where the operator named none."""
        if self.ledger is None:
            raise Problem("not-found", "this service reads no ledger (setting ledger)")
        return self.ledger


def office_of(request: Request) -> Office:
    """The office of the app that serves this request."""
    found: Office = request.app.state.office
    return found
