"""Where a phase runs: which rank of how many, on what device, whom it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

State = dict[str, Any]


class WorkerContext(Protocol):
    """One process of a phase. `mtlsign.distributed.train` has the implementation over Ray Train."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Add the tensors of all ranks, in place."""

    def load_checkpoint(self) -> State | None:
        """The state of the last checkpoint of this phase, on the CPU; None at the beginning."""

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Tell one row of metrics; with `state`, keep a checkpoint. Every rank calls it equally often."""

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Show progress between reports. May be dropped."""


class SingleProcessContext:
    """The only rank: a plain process, a notebook, a GPU machine without Ray.

    Args:
        device: where to train.
        show: called with every row of progress.
        keep: called with every checkpoint state; `state` is where to go on from.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        show: Callable[[Mapping[str, Any]], None] | None = None,
        keep: Callable[[State], None] | None = None,
        state: State | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._show, self._keep, self._state = show, keep, state

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Nothing to add."""

    def load_checkpoint(self) -> State | None:
        """The state given."""
        return self._state

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Show the row, keep the state."""
        self.show_progress(row)
        if state is not None and self._keep is not None:
            self._keep(state())

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Show the row."""
        if self._show is not None:
            self._show(row)


def sum_over_group(tensors: list[Tensor]) -> None:
    """All-reduce in one message, in a fixed order, so that runs of equal world size give equal bits."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    distributed.all_reduce(flat)
    offset = 0
    for t in tensors:
        t.copy_(flat[offset : offset + t.numel()].reshape(t.shape))
        offset += t.numel()
