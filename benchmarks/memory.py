"""Benchmark of memory: peak of each phase, in multiples of the size of the parameters. Linux only (VmHWM).

Each measurement runs in a child process. The child loads data and code, clears its high-water mark and then
runs one part: phase 1, phase 2 (a few steps each, by the functions that the jobs call), or the bare passes of
phase 2. The peak of the bare passes, less the networks and gradients, is the size of the activations.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.fixtures import BareForward, BenchmarkSetup, Options
from benchmarks.measure import Row, row
from mtlsign.models import loading
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.phase2 import embed_watermark
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.verification.detector import WatermarkDetector

#: malloc returns large blocks at once, so that the peak shows memory in use and not memory in its cache.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
#: Sizes that `BareForward` holds apart from activations: tapped copy, student, teacher, student's gradients.
_BARE_COPIES = 4
#: Peaks hardly vary, so more repetitions are not needed.
_MAX_ROUNDS = 3


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def child(part: str, options: Options) -> dict[str, float]:
    """Return the bytes that one part (`clean`, `mark` or `bare`) adds at its peak."""
    setup = BenchmarkSetup.create(str(options["task"]), options["data"], options["width"])  # type: ignore[arg-type]
    settings = setup.settings.updated({"phase1.epochs": 1, "phase2.steps": 4})
    small = setup.with_sizes(train=4 * settings.phase1.batch, validation=500, test=500)
    parameters = sum(p.numel() * p.element_size() for p in setup.model.parameters())
    BareForward(setup).run_step(1)  # libraries allocate their scratch space on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    if part == "clean":
        train_clean_model(copy.deepcopy(setup.model), small, settings, SingleProcessContext())
    elif part == "mark":
        base_weights = loading.cpu_state(setup.model)  # held by the caller of phase 2, like the detector
        detector = WatermarkDetector(setup.opening, setup.reference)
        embed_watermark(copy.deepcopy(setup.model), small, detector, settings, SingleProcessContext())
        del base_weights
    else:
        _run_bare_passes(setup)
    return {"bytes": status_bytes("VmHWM") - before, "parameters": parameters}


def _run_bare_passes(setup: BenchmarkSetup) -> None:
    bare = BareForward(setup)
    for _ in range(3):  # not run_step, which frees the gradients: they must exist all the time
        bare.run_primary_batch()
        bare.run_key_batch()


def _measure(part: str, options: Options) -> dict[str, float]:
    code = (
        "import json, sys; from benchmarks import memory; import torch; torch.set_num_threads(1); "
        "print(json.dumps(memory.child(sys.argv[1], json.loads(sys.argv[2]))))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, part, json.dumps(options)],
        env={**os.environ, **MALLOC, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    answer: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return answer


def peaks(options: Options, pairs: int) -> list[Row]:
    """Measure the peaks of both phases, with three child processes in each round."""
    difference, held = [], []
    mib: dict[str, float] = {}
    for _ in range(min(pairs, _MAX_ROUNDS)):
        peak = {part: _measure(part, options) for part in ("clean", "mark", "bare")}
        size = peak["clean"]["parameters"]
        activations = peak["bare"]["bytes"] - _BARE_COPIES * size
        difference.append((peak["mark"]["bytes"] - peak["clean"]["bytes"]) / size)
        held.append((peak["mark"]["bytes"] - activations) / size)
        mib = {part: value["bytes"] / 2**20 for part, value in peak.items()}
        mib |= {"activations": activations / 2**20, "parameters": size / 2**20}
    note = (
        f"MiB over the start: phase 1 {mib['clean']:.0f}, phase 2 {mib['mark']:.0f}, "
        f"activations of phase 2 {mib['activations']:.0f}, parameters {mib['parameters']:.1f}"
    )
    return [
        row("memory", "peak of phase 2 - peak of phase 1, in parameters", difference, note=note),
        row("memory-held", "peak of phase 2 - its activations, in parameters", held, at_most=8, note=note),
    ]
