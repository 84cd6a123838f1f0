"""Who may go next: so many at a time, in turns by name, so that nobody's queue delays another's."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class FairSemaphore:
    """`room` places; whoever waits in line gets one when his name's turn comes, whatever others queued."""

    def __init__(self, room: int) -> None:
        self._free = room
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Hold a place."""
        if self._free and not self._lines:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self._lines.setdefault(name, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                else:
                    self._leave(name, turn)
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _leave(self, name: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(name)
        if line is not None:
            with suppress(ValueError):
                line.remove(turn)
            if not line:
                del self._lines[name]

    def _pass_on(self) -> None:
        while self._lines:
            name, line = next(iter(self._lines.items()))
            turn = line.popleft()
            if line:
                self._lines.move_to_end(name)
            else:
                del self._lines[name]
            if not turn.done():  # else cancelled meanwhile
                turn.set_result(None)
                return
        self._free += 1
