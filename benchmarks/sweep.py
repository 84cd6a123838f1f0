"""Benchmark of Ray Tune's overhead on a sweep of 24 cells. Target: at most 1.15.

    uv run benchmarks/sweep.py --data DATA [--task fashion-mnist@0.1] [--workers 2]

The overhead is the wall time × workers ÷ (cells × one phase 2 with its attacks + one phase 1). The divisor
comes from plain processes, as many as there are workers. Each runs phase 1 and two cells, all at the same
time, as the workers do. The start of Ray and the imports on both sides are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mtlsign.config.sweep import SweepSettings
from mtlsign.experiments.sweeps.cell import SharedCellData, run_cell, train_shared_clean_model
from mtlsign.experiments.sweeps.space import cells_of, load_space
from mtlsign.storage.locations import open_storage

#: Cells that each plain process runs for the divisor.
PLAIN_CELLS = 2


def space() -> dict[str, Any]:
    """Return 24 cells of the paper's grid."""
    from tune_spaces import paper_grid

    values = [0.02, 0.06, 0.1, 0.14, 0.18]
    lambda1, lambda2 = {"grid_search": values[:4]}, {"grid_search": [*values, 0.2]}
    return paper_grid() | {"lambda1": lambda1, "lambda2": lambda2}


def run_plain(settings: SweepSettings, number: int) -> dict[str, list[float]]:
    """Return the wall seconds of phase 1 and of each cell in this process, the one with that number."""
    import torch

    torch.set_num_threads(1)
    cells = cells_of(load_space(settings), settings)[number * PLAIN_CELLS :][:PLAIN_CELLS]
    folder = open_storage(settings.storage)
    started = time.monotonic()
    base_weights = {cells[0].clean_name: train_shared_clean_model(cells[0], folder)}
    times = [time.monotonic() - started]
    shared = SharedCellData(
        folder=folder, base_weights=base_weights, attacks=settings.attacks,
        min_evidence_bits=settings.min_evidence_bits, data=settings.data, download=settings.download,
    )  # fmt: skip
    for cell in cells:
        started = time.monotonic()
        run_cell(cell, shared)
        times.append(time.monotonic() - started)
    return {"phase1": times[:1], "cells": times[1:]}


def plain_seconds(workers: int, scratch: str) -> tuple[float, float]:
    """Return the mean wall seconds of phase 1 and of one cell over plain processes that run together."""
    command = [sys.executable, __file__, *sys.argv[1:], "--plain"]
    children = [
        subprocess.Popen(
            [*command, str(i), "--folder", f"{scratch}/plain{i}"], stdout=subprocess.PIPE, text=True
        )
        for i in range(workers)
    ]
    times = [json.loads(child.communicate()[0]) for child in children]
    phase1 = statistics.fmean(t for row in times for t in row["phase1"])
    cell = statistics.fmean(t for row in times for t in row["cells"])
    print(f"plain: phase 1 {phase1:.1f} s, a cell {cell:.1f} s", file=sys.stderr, flush=True)
    return phase1, cell


def ray_seconds(settings: SweepSettings) -> tuple[float, dict[str, Any]]:
    """Return the wall seconds of the sweep on Ray Tune, and its result."""
    from mtlsign.distributed import cluster
    from mtlsign.distributed.tune import RaySweepBackend
    from mtlsign.experiments.sweeps.run import run_sweep_job

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    cluster.connect()
    started = time.monotonic()
    result = run_sweep_job(settings, RaySweepBackend(), log=log)
    return time.monotonic() - started, result


def main() -> int:
    """Measure both and print one JSON object; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the datasets in torchvision's layout")
    parser.add_argument("--task", default="fashion-mnist@0.1", help="as for jobs/embed.py")
    parser.add_argument(
        "--set", action="append", help="setting of each cell [phase1.epochs=6 phase2.steps=80 key_size=256]"
    )
    parser.add_argument("--attacks", default="ftal:lr=quarter,epochs=3,prune:ratio=0.6")
    parser.add_argument("--workers", type=int, default=2, help="concurrent cells")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    overrides = options.set or ["phase1.epochs=6", "phase2.steps=80", "key_size=256"]
    with tempfile.TemporaryDirectory() as scratch:
        settings = SweepSettings.of(
            {"space": "benchmarks.sweep:space", "data": options.data, "task": options.task, "set": overrides,
             "attacks": options.attacks, "workers": options.workers, "storage": options.folder or scratch}
        )  # fmt: skip
        if options.plain is not None:
            print(json.dumps(run_plain(settings, options.plain)))
            return 0
        phase1, cell = plain_seconds(options.workers, scratch)
        wall, result = ray_seconds(settings)
    plain_total = result["cells"] * cell + phase1
    print(
        json.dumps(
            {
                "cells": result["cells"], "ok": result["ok"], "workers": options.workers,
                "wall_s": round(wall, 1), "plain_cell_s": round(cell, 2), "plain_phase1_s": round(phase1, 2),
                "overhead": round(wall * options.workers / plain_total, 3),
            }
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
