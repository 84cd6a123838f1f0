"""All ratios in one command: `uv run benchmarks/run.py [--only NAME] [--json]` (see `benchmarks/README.md`).

The exit code is 0 if the benchmarks ran, also if a target was missed. With `--strict` it is 1 in that case.
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

from benchmarks import memory, training_step, verification, workers
from benchmarks.fixtures import BenchmarkSetup, Options
from benchmarks.measure import Row, hardware

NAMES = ("qr", "verify", "step", "phases", "memory", "workers")
MAX_PAIRS = 40  # phase 2 writes a checkpoint every 50 steps, which is not part of a step


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Ratios in one run, medians over interleaved pairs.")
    parser.add_argument("--only", action="append", choices=NAMES, help="run only this one; may be repeated")
    parser.add_argument(
        "--pairs", type=int, default=5, help=f"interleaved pairs of each ratio, at most {MAX_PAIRS}"
    )
    parser.add_argument("--task", default="digits", help="as for jobs/embed.py")
    parser.add_argument("--data", help="data root in torchvision's layout")
    parser.add_argument("--width", type=int, default=None, help="channels of the first stage")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument(
        "--whole", action="store_true", help="phases: run both whole (hours) instead of estimating"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    options = parser.parse_args(argv)
    if not 1 <= options.pairs <= MAX_PAIRS:
        parser.error(f"--pairs must be from 1 to {MAX_PAIRS}")
    return options


def run(options: argparse.Namespace, log: Callable[[str], None] = lambda _: None) -> dict[str, object]:
    """Run the selected benchmarks; return hardware, setup and rows as JSON values."""
    torch.set_num_threads(options.threads)
    setup, pairs = BenchmarkSetup.create(options.task, options.data, options.width), options.pairs
    child_options: Options = {"task": options.task, "data": options.data, "width": setup.settings.width}
    benchmarks: dict[str, Callable[[], list[Row]]] = {
        "qr": lambda: verification.encoder(setup, pairs),
        "verify": lambda: verification.verification(setup, pairs),
        "step": lambda: training_step.step_over_parts(setup, pairs),
        "phases": lambda: training_step.phase_2_over_1(setup, pairs, estimate=not options.whole),
        "memory": lambda: memory.peaks(child_options, pairs),
        "workers": lambda: workers.two_over_one(child_options, pairs),
    }
    machine = hardware()
    log(", ".join(f"{name} {value}" for name, value in machine.items()))
    log(str(setup))
    rows: list[Row] = []
    for name in options.only or NAMES:
        for row in benchmarks[name]():
            log(line(row))
            rows.append(row)
    return {"hardware": machine, "setup": str(setup), "rows": [row.to_json() for row in rows]}


def line(row: Row) -> str:
    """Format one row for the terminal."""
    state = {True: "pass", False: "MISS", None: ""}[row.passed]
    wall = "" if row.wall is None else f", wall {row.wall:.3g}"
    spread = f"{row.low:.3g}..{row.high:.3g}, {row.pairs} pairs{wall}"
    return (
        f"{row.name:12} {row.value:8.3f}  ({spread})  {row.target or '':8} {state:4}  {row.title}; {row.note}"
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks and print them; return the exit code."""
    options = arguments(argv)
    result = run(options, (lambda _: None) if options.json else lambda text: print(text, flush=True))
    if options.json:
        print(json.dumps(result, indent=1))
    missed = any(row["passed"] is False for row in result["rows"])  # type: ignore[attr-defined]
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
