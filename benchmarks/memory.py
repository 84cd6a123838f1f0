"""(g) Peak memory of the two phases, each in a process of its own, in multiples of the parameters' size.

A child loads data and code, clears its high-water mark and then runs one piece: phase 1 or phase 2
(the functions that the jobs call, a few steps each), or the bare passes of phase 2, whose peak
less the networks and gradients is what the activations take. Linux only (VmHWM).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Row, row
from benchmarks.scene import Bare, Scene
from mtlsign.models import loading
from mtlsign.watermark.embedding import training
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Large blocks go back to the system at once, so that the mark shows what was live and not what was cached.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

#: What `Bare` holds beside activations, in parameters: tapped copy, student, teacher, student's gradients.
BARE_HOLDS = 4


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def child(piece: str, options: dict[str, str | int | None]) -> dict[str, float]:
    """Bytes that one piece adds at its peak."""
    scene = Scene.of(str(options["task"]), options["data"], options["width"])  # type: ignore[arg-type]
    s = scene.settings.model_copy(update={"epochs": 1, "steps": 4})
    small = scene.fewer(train=4 * s.batch, validation=500, test=500)
    parameters = sum(p.numel() * p.element_size() for p in scene.model.parameters())
    bare = Bare(scene)
    bare.step(1)  # libraries make their scratch space on first use
    del bare
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    if piece == "clean":
        training.train_clean_model(copy.deepcopy(scene.model), small, s, SingleProcessContext())
    elif piece == "mark":
        base_weights = loading.cpu_state(
            scene.model
        )  # the caller's, and a probe with its skeleton: as `mark_phase`
        detector = WatermarkDetector(scene.opening, scene.reference)
        training.embed_watermark(copy.deepcopy(scene.model), small, detector, s, SingleProcessContext())
        del base_weights
    else:
        _activations(scene)
    return {"bytes": _status("VmHWM") - before, "parameters": parameters}


def _activations(scene: Scene) -> None:
    bare = Bare(scene)
    for _ in range(3):  # without Bare.step, which frees the gradients: they are to be there all the time
        bare.primary()
        bare.key_batch()


def _measure(piece: str, options: dict[str, str | int | None]) -> dict[str, float]:
    code = (
        "import json, sys; from benchmarks import memory; import torch; torch.set_num_threads(1); "
        "print(json.dumps(memory.child(sys.argv[1], json.loads(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, piece, json.dumps(options)],
        env={**os.environ, **_MALLOC, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def peaks(options: dict[str, str | int | None], pairs: int) -> list[Row]:
    """Three children a round; three rounds are enough, peaks hardly vary."""
    difference, held = [], []
    notes: dict[str, float] = {}
    for _ in range(min(pairs, 3)):
        got = {piece: _measure(piece, options) for piece in ("clean", "mark", "bare")}
        p = got["clean"]["parameters"]
        activations = got["bare"]["bytes"] - BARE_HOLDS * p
        difference.append((got["mark"]["bytes"] - got["clean"]["bytes"]) / p)
        held.append((got["mark"]["bytes"] - activations) / p)
        notes = {k: v["bytes"] / 2**20 for k, v in got.items()} | {
            "activations": activations / 2**20,
            "p": p / 2**20,
        }
    note = (
        f"MiB over the start: phase 1 {notes['clean']:.0f}, phase 2 {notes['mark']:.0f}, "
        f"activations of phase 2 {notes['activations']:.0f}, parameters {notes['p']:.1f}"
    )
    return [
        row("memory", "peak of phase 2 - peak of phase 1, in parameters", difference, note=note),
        row("memory-held", "peak of phase 2 - its activations, in parameters", held, at_most=8, note=note),
    ]
