"""Context of one training process: rank, world size, device and progress callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

#: Checkpoint of a phase: tensors, numbers and text in dicts and lists.
State = dict[str, Any]


class WorkerContext(Protocol):
    """One process of a phase. `mtlsign.distributed.train` has the implementation on Ray Train."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Add the tensors of all ranks, in place."""

    def load_checkpoint(self) -> State | None:
        """Return the last checkpoint of this phase, on the CPU; None at the start."""

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Report one row of metrics and, if `state` is given, save a checkpoint.

        Collective: every rank must call it the same number of times.
        """

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Show progress between reports. May be dropped."""


class SingleProcessContext:
    """Context of the only rank: a plain process, a notebook, a GPU machine without Ray.

    Args:
        device: where to train.
        on_progress: called with every row of progress.
        on_checkpoint: called with every checkpoint.
        state: checkpoint from which to continue.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        on_progress: Callable[[Mapping[str, Any]], None] | None = None,
        on_checkpoint: Callable[[State], None] | None = None,
        state: State | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._on_progress, self._on_checkpoint, self._state = on_progress, on_checkpoint, state

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Leave the tensors unchanged: there is one rank."""

    def load_checkpoint(self) -> State | None:
        """Return the checkpoint given to the constructor."""
        return self._state

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Show the row and pass the checkpoint on."""
        self.show_progress(row)
        if state is not None and self._on_checkpoint is not None:
            self._on_checkpoint(state())

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Show the row."""
        if self._on_progress is not None:
            self._on_progress(row)


def sum_over_group(tensors: list[Tensor]) -> None:
    """All-reduce in one message, in a fixed order, so that runs of equal world size give equal bits."""
    if not tensors or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].reshape(tensor.shape))
        offset += tensor.numel()
