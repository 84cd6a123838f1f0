"""What Ray Tune costs a sweep: wall time × workers ÷ (cells × one phase 2 with its attacks + one phase 1).

    uv run benchmarks/sweep.py --data DATA [--task fashion-mnist@0.1] [--workers 2]

The divisor comes from as many plain processes as there are workers, each running phase 1 and two cells at the
same time as the others, as the workers do. Ray's start-up and the imports of both are left out. Target: 1.15.
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
from mtlsign.experiments.sweeps.space import cells_of, load_space
from mtlsign.experiments.sweeps.trial import SharedTrialData, run_cell, train_shared_clean_model
from mtlsign.storage.locations import open_storage

#: Cells on which the divisor is measured, in each process.
PLAIN = 2


def space() -> dict[str, Any]:
    """24 cells of the paper's grid."""
    from tune_spaces import paper_grid

    some = [0.02, 0.06, 0.1, 0.14, 0.18]
    return paper_grid() | {"lambda1": {"grid_search": some[:4]}, "lambda2": {"grid_search": [*some, 0.2]}}


def plain(settings: SweepSettings, number: int) -> dict[str, list[float]]:
    """Wall seconds of phase 1 and of cells, in this process."""
    import torch

    torch.set_num_threads(1)
    cells = cells_of(load_space(settings), settings)[number * PLAIN :][:PLAIN]
    folder = open_storage(settings.storage)
    started = time.monotonic()
    clean = {cells[0].clean_name: train_shared_clean_model(cells[0], folder)}
    times = [time.monotonic() - started]
    shared = SharedTrialData(folder, clean, settings.attacks, settings.bits, settings.data, settings.download)
    for cell in cells:
        started = time.monotonic()
        run_cell(cell, shared)
        times.append(time.monotonic() - started)
    return {"phase1": times[:1], "cells": times[1:]}


def main() -> int:
    """Measure both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="fashion-mnist@0.1")
    parser.add_argument("--fixed", default="epochs=6,steps=80,key_size=256")
    parser.add_argument("--attacks", default="ftal:lr=quarter,epochs=3,prune:ratio=0.6")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        settings = SweepSettings.of(
            {"space": "benchmarks.sweep:space", "data": a.data, "task": a.task, "fixed": a.fixed,
             "attacks": a.attacks, "workers": a.workers, "storage": a.folder or scratch}
        )  # fmt: skip
        if a.plain is not None:
            print(json.dumps(plain(settings, a.plain)))
            return 0
        command = [sys.executable, __file__, *sys.argv[1:], "--plain"]
        children = [
            subprocess.Popen(
                [*command, str(i), "--folder", f"{scratch}/plain{i}"], stdout=subprocess.PIPE, text=True
            )
            for i in range(a.workers)
        ]
        told = [json.loads(child.communicate()[0]) for child in children]
        cell = statistics.fmean(t for one in told for t in one["cells"])
        phase1 = statistics.fmean(t for one in told for t in one["phase1"])
        print(f"plain: phase 1 {phase1:.1f} s, a cell {cell:.1f} s", file=sys.stderr, flush=True)

        from mtlsign.distributed import cluster
        from mtlsign.distributed.tune import RaySweepBackend
        from mtlsign.experiments.sweeps.run import run

        cluster.connect()
        started = time.monotonic()
        result = run(settings, RaySweepBackend(), say=lambda line: print(line, file=sys.stderr, flush=True))
        wall = time.monotonic() - started
    whole = result["cells"] * cell + phase1
    print(
        json.dumps(
            {
                "cells": result["cells"], "ok": result["ok"], "workers": a.workers, "wall_s": round(wall, 1),
                "plain_cell_s": round(cell, 2), "plain_phase1_s": round(phase1, 2),
                "overhead": round(wall * a.workers / whole, 3),
            }
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
