"""Every ratio in one command: `uv run benchmarks/run.py [--only NAME] [--json]`; see `benchmarks/README.md`.

The exit code is 0 when the benchmarks ran, whether or not every target was met, and 1 with `--strict` when
one was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, reading, steps, workers
from benchmarks.measure import Row, hardware
from benchmarks.scene import Scene

NAMES = ("qr", "verify", "step", "phases", "memory", "workers")
MAX_PAIRS = 40  # phase 2 reports every 50 steps, and a report is not part of a step


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratios in one run, medians over interleaved pairs.")
    parser.add_argument("--only", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument(
        "--pairs", type=int, default=5, help=f"interleaved pairs of each ratio, at most {MAX_PAIRS}"
    )
    parser.add_argument("--task", default="digits", help="as for jobs/embed.py")
    parser.add_argument("--data", help="data root in torchvision's layout")
    parser.add_argument("--width", type=int, default=None, help="channels of the first stage")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument(
        "--whole", action="store_true", help="phases: run both whole (hours), do not estimate"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where a target is missed")
    options = parser.parse_args(argv)
    if not 1 <= options.pairs <= MAX_PAIRS:
        parser.error(f"--pairs must be from 1 to {MAX_PAIRS}")
    return options


def run(options: argparse.Namespace, say: Callable[[str], None] = lambda _: None) -> dict[str, object]:
    """Everything asked for, as one JSON-ready mapping."""
    torch.set_num_threads(options.threads)
    scene, pairs = Scene.of(options.task, options.data, options.width), options.pairs
    place = {"task": options.task, "data": options.data, "width": scene.settings.width}
    wanted: dict[str, Callable[[], list[Row]]] = {
        "qr": lambda: reading.encoder(scene, pairs),
        "verify": lambda: reading.verification(scene, pairs),
        "step": lambda: steps.step_over_parts(scene, pairs),
        "phases": lambda: steps.phase_2_over_1(scene, pairs, whole=options.whole),
        "memory": lambda: memory.peaks(place, pairs),
        "workers": lambda: workers.two_over_one(place, pairs),
    }
    machine = hardware()
    say(", ".join(f"{name} {value}" for name, value in machine.items()))
    say(str(scene))
    rows: list[Row] = []
    for name in options.only or NAMES:
        for row in wanted[name]():
            say(line(row))
            rows.append(row)
    return {"hardware": machine, "scene": str(scene), "rows": [row.to_json() for row in rows]}


def line(row: Row) -> str:
    """One row for a person."""
    state = {True: "pass", False: "MISS", None: ""}[row.passed]
    wall = "" if row.wall is None else f", wall {row.wall:.3g}"
    spread = f"{row.low:.3g}..{row.high:.3g}, {row.pairs} pairs{wall}"
    return (
        f"{row.name:12} {row.value:8.3f}  ({spread})  {row.target or '':8} {state:4}  {row.what}; {row.note}"
    )


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    done = run(options, (lambda _: None) if options.json else lambda text: print(text, flush=True))
    if options.json:
        print(json.dumps(done, indent=1))
    missed = any(row["passed"] is False for row in done["rows"])  # type: ignore[attr-defined]
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
