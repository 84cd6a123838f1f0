"""Semaphore that serves names in rotation, so that the queue of one name does not delay another name."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class FairSemaphore:
    """Semaphore with `size` places. Names take turns; the waiters of one name are served in order."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiters: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[None]:
        """Hold one place in the name of `name`."""
        if self._free and not self._waiters:
            self._free -= 1
        else:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.setdefault(name, deque()).append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake_next()
                else:
                    self._cancel_waiter(name, waiter)
                raise
        try:
            yield
        finally:
            self._wake_next()

    def _cancel_waiter(self, name: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(name)
        if waiters is not None:
            with suppress(ValueError):
                waiters.remove(waiter)
            if not waiters:
                del self._waiters[name]

    def _wake_next(self) -> None:
        while self._waiters:
            name, waiters = next(iter(self._waiters.items()))
            waiter = waiters.popleft()
            if waiters:
                self._waiters.move_to_end(name)
            else:
                del self._waiters[name]
            if not waiter.done():  # a finished future belongs to a waiter that was cancelled
                waiter.set_result(None)
                return
        self._free += 1
