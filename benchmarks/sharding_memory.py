"""Benchmark of the memory of sharded training: phase 1 of a transformer in two processes. Linux only (VmHWM).

    uv run python -m benchmarks.sharding_memory

It prints one JSON object for each rank, with replicas and with shards. Growth is the peak of resident memory
in phase 1 less that before it, which includes the network. The weights are random, and so are the texts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, distributed, multiprocessing

from benchmarks.memory import MALLOC, status_bytes
from mtlsign.config.embed import EmbedSettings
from mtlsign.models.architectures import build
from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.splitting import SPLITS
from mtlsign.watermark.embedding.memory import estimate_memory
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.worker import SingleProcessContext, sum_over_group

_MIB = 2**20
_SPEC = TextSpec(vocabulary=80, embedding=512, length=10, classes=4)
_ARCHITECTURE: dict[str, object] = {
    "arch": "transformer", "vocabulary": 80, "embedding": 512, "heads": 8, "kv_heads": 8, "head_size": 64,
    "inner": 2048, "layers": 12, "length": 10, "classes": 4, "norm": "rms", "positions": "rotary", "gated": 1,
    "activation": "silu", "bias": 0,
}  # fmt: skip


class _RandomTexts:
    """A split of 96 random texts."""

    def __len__(self) -> int:
        return 96

    def to(self, device: torch.device | str) -> _RandomTexts:
        return self

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        count = len(indices[part or slice(None)])
        return Batch(torch.randint(1, 80, (count, 10)), torch.randint(0, 4, (count,)))


class _GroupWorker(SingleProcessContext):
    """Worker context of one process of a group; rank 0 makes checkpoints, as a job does."""

    def __init__(self) -> None:
        super().__init__(on_checkpoint=lambda state: None)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()  # type: ignore[misc]

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        sum_over_group(tensors)

    def report(self, row: Any, state: Any) -> None:
        super().report(row, state if self.rank == 0 else None)


def measure(rank: int, sharding: str, group: str) -> None:
    """Train as one of two processes, and print the memory."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{group}", rank=rank, world_size=2)
    values = {
        "task": "custom", "model": "transformer", "sharding": sharding, "lambda2": 0, "phase1.epochs": 1,
        "phase1.batch": 32, "phase1.optimizer": "adam", "phase1.lr": 0.001,
    }  # fmt: skip
    settings = EmbedSettings.of(values).with_defaults()
    estimate = estimate_memory(settings, _ARCHITECTURE, _SPEC, world=2)
    assert estimate is not None
    model = build(_ARCHITECTURE)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train_clean_model(
        model, Task("texts", _SPEC, dict.fromkeys(SPLITS, _RandomTexts())), settings, _GroupWorker()
    )
    growth = status_bytes("VmHWM") - before
    row = {"sharding": sharding, "rank": rank, "parameters": parameters}
    print(
        json.dumps(row | {"growth_mib": growth // _MIB, "estimate_mib": estimate.phase1 // _MIB}), flush=True
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        multiprocessing.spawn(measure, (sys.argv[1], sys.argv[2]), nprocs=2)
    else:
        for kind in ("none", "fsdp"):
            name = f"/tmp/mtlsign-group-{os.getpid()}-{kind}"
            command = [sys.executable, "-m", "benchmarks.sharding_memory", kind, name]
            subprocess.run(command, env=os.environ | MALLOC, check=True)
