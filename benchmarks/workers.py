"""Benchmark of data parallelism: phase 2 on two workers with one thread each against one with two threads.

The workers are plain processes that add gradients with gloo, as the workers of Ray Train do.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, distributed

from benchmarks.fixtures import BenchmarkSetup, Options
from benchmarks.measure import Row, ratio
from mtlsign.watermark.embedding.phase2 import embed_watermark
from mtlsign.watermark.embedding.worker import SingleProcessContext, sum_over_group

STEPS, WARM_UP = 10, 2


class _StopBenchmark(BaseException):
    """Ends phase 2 after the last step."""


class _RankContext(SingleProcessContext):
    """Worker context of one rank; it records the time of each step."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.times: list[float] = []

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Add the tensors of all ranks and record the time."""
        sum_over_group(tensors)
        self.times.append(time.perf_counter())
        if len(self.times) > STEPS:
            raise _StopBenchmark


def child(rank: int, world_size: int, port: int, options: Options) -> float:
    """Return the wall seconds of one step.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        port: port of rank 0 on the loopback address.
        options: task, data and width.
    """
    torch.set_num_threads(2 // world_size)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", address, rank=rank, world_size=world_size)
    setup = BenchmarkSetup.create(str(options["task"]), options["data"], options["width"])  # type: ignore[arg-type]
    context, model = _RankContext(rank, world_size), copy.deepcopy(setup.model)
    with contextlib.suppress(_StopBenchmark):
        embed_watermark(model, setup.task, setup.detector, setup.settings, context)
    return (context.times[-1] - context.times[WARM_UP]) / (len(context.times) - 1 - WARM_UP)


def _step_seconds(world_size: int, options: Options) -> float:
    """Return the wall seconds of one step on the slowest of `world_size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import json, sys; from benchmarks import workers; a = sys.argv; "
        "print(workers.child(int(a[1]), int(a[2]), int(a[3]), json.loads(a[4])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world_size), str(port), json.dumps(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(error[-1000:] for _, error in outputs))
    return max(float(out.splitlines()[-1]) for out, _ in outputs)


def two_over_one(options: Options, pairs: int) -> list[Row]:
    """Compare a step on two workers with one thread each with a step on one worker with two threads."""
    two, one = [], []
    for _ in range(pairs):
        two.append(_step_seconds(2, options))
        one.append(_step_seconds(1, options))
    title = "one phase-2 step on 2 workers x 1 thread / on 1 worker x 2 threads"
    note = f"means of {STEPS - WARM_UP} steps, gloo on this machine"
    return [ratio("workers", title, [(t, t) for t in two], [(t, t) for t in one], clock="wall", note=note)]
