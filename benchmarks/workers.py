"""(f) Phase 2 on two workers of one thread each against one of two threads: wall seconds a step.

Workers are two plain processes that add gradients through gloo, as Ray Train's workers do.
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

from benchmarks.measure import Row, ratio
from benchmarks.scene import Scene
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.worker import SingleProcessContext, sum_over_group

STEPS, WARM_UP = 10, 2


class _Enough(BaseException):
    pass


class _Member(SingleProcessContext):
    def __init__(self, index: int, world: int) -> None:
        super().__init__()
        self.rank, self.world_size = index, world
        self.times: list[float] = []

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        sum_over_group(tensors)
        self.times.append(time.perf_counter())
        if len(self.times) > STEPS:
            raise _Enough


def child(index: int, world: int, port: int, options: dict[str, str | int | None]) -> float:
    """Wall seconds a step on rank `index` of `world`."""
    torch.set_num_threads(2 // world)
    if world > 1:
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=index, world_size=world)
    scene = Scene.of(str(options["task"]), options["data"], options["width"])  # type: ignore[arg-type]
    rank = _Member(index, world)
    with contextlib.suppress(_Enough):
        training.embed_watermark(copy.deepcopy(scene.model), scene.task, scene.detector, scene.settings, rank)
    return (rank.times[-1] - rank.times[WARM_UP]) / (len(rank.times) - 1 - WARM_UP)


def _together(world: int, options: dict[str, str | int | None]) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import json, sys; from benchmarks import workers; a = sys.argv; "
        "print(workers.child(int(a[1]), int(a[2]), int(a[3]), json.loads(a[4])))"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    environment.pop("OMP_NUM_THREADS", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i), str(world), str(port), json.dumps(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(error[-1000:] for _, error in outputs))
    return max(float(out.splitlines()[-1]) for out, _ in outputs)


def two_over_one(options: dict[str, str | int | None], pairs: int) -> list[Row]:
    """Seconds a step on 2 workers x 1 thread / 1 worker x 2 threads."""
    two, one = [], []
    for _ in range(pairs):
        two.append(_together(2, options))
        one.append(_together(1, options))
    what = "one phase-2 step on 2 workers x 1 thread / on 1 worker x 2 threads"
    note = f"means of {STEPS - WARM_UP} steps, gloo on this machine"
    return [ratio("workers", what, [(t, t) for t in two], [(t, t) for t in one], clock="wall", note=note)]
