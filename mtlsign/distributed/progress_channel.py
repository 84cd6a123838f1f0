"""Rows of progress on their way from rank 0 to the driver; light, because an actor's process imports it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any


class ProgressChannel:
    """Holds the newest rows of rank 0; an actor without CPUs."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def post(self, row: dict[str, Any]) -> None:
        """Pin a row; old ones fall off."""
        self._rows = [*self._rows[-200:], row]

    def take(self) -> list[dict[str, Any]]:
        """The rows since the last call."""
        rows, self._rows = self._rows, []
        return rows


def forward_progress(
    board: Any, show: Callable[[Mapping[str, Any]], None] | None, finished: threading.Event
) -> None:
    """Call `show` with every row until `finished` is set; runs in a thread of the driver."""
    import ray

    while show is not None:
        last = finished.wait(0.5)
        try:
            for row in ray.get(board.take.remote(), timeout=10):
                show(row)
        except ray.exceptions.GetTimeoutError:
            pass
        except ray.exceptions.RayError:  # progress is a courtesy: fit() itself reports a dying cluster
            return
        if last:
            return
