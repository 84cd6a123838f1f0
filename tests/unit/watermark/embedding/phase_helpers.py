"""Helpers of the tests of both phases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding.run_folder import state_bytes
from mtlsign.watermark.embedding.worker import SingleProcessContext, State

Settings = Callable[..., EmbedSettings]


Maker = Callable[..., nn.Module]


class ProgressRecorder(SingleProcessContext):
    """Worker context that stores every checkpoint as bytes and every row."""

    def __init__(self, state: State | None = None) -> None:
        self.checkpoints: list[bytes] = []
        self.rows: list[Mapping[str, Any]] = []
        super().__init__(
            on_progress=self.rows.append,
            on_checkpoint=lambda s: self.checkpoints.append(state_bytes(s)),
            state=state,
        )


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


class ReduceBarrier:
    """Sum of tensors over threads that act as ranks, in rank order."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.contributions: list[list[Tensor]] = [[] for _ in range(world)]


class ThreadWorker(SingleProcessContext):
    """Worker context of one thread."""

    def __init__(self, index: int, meeting: ReduceBarrier) -> None:
        super().__init__()
        self.rank, self.world_size, self.meeting = index, len(meeting.contributions), meeting  # type: ignore[misc]
        self.sums: list[list[Tensor]] = []

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        self.meeting.contributions[self.rank] = [t.clone() for t in tensors]
        self.meeting.barrier.wait()
        for i, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([part[i] for part in self.meeting.contributions]).sum(0))
        self.meeting.barrier.wait()
        self.sums.append([t.clone() for t in tensors])
