"""Channel that carries progress rows from the worker of rank 0 to the driver.

It imports little, because Ray starts a process for the channel's actor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

#: Rows that the channel holds; older ones are dropped.
CAPACITY = 200
_POLL_S = 0.5


class ProgressChannel:
    """Bounded buffer of progress rows. Ray runs it as an actor without CPUs."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def put(self, row: dict[str, Any]) -> None:
        """Append a row and drop the oldest rows above the capacity."""
        self._rows = [*self._rows[-CAPACITY:], row]

    def drain(self) -> list[dict[str, Any]]:
        """Return and remove all rows."""
        rows, self._rows = self._rows, []
        return rows


def forward_progress(
    channel: Any, on_progress: Callable[[Mapping[str, Any]], None] | None, finished: threading.Event
) -> None:
    """Pass every row to a callback until the phase is finished; to be run in a thread of the driver.

    Args:
        channel: handle of the `ProgressChannel` actor.
        on_progress: the callback; without one the function returns at once.
        finished: set by the driver when the phase has ended.
    """
    import ray

    while on_progress is not None:
        last = finished.wait(_POLL_S)
        try:
            for row in ray.get(channel.drain.remote(), timeout=10):
                on_progress(row)
        except ray.exceptions.GetTimeoutError:
            pass
        except ray.exceptions.RayError:  # progress is optional, and fit() reports a lost cluster itself
            return
        if last:
            return
