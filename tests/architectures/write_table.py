"""Writer of the result folder from the rows of `test_architectures.py`.

Usage: `python -m tests.architectures.write_table ROWS FOLDER TREE`, with TREE the measured tree.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from tests.architectures.zoo import ZOO

COLUMNS = (
    *("architecture", "first_stage", "last_stage", "layers"),
    *("unmarked", "embedded", "file", "bf16", "prefixed", "refusal"),
)
_EXPERIMENT = """\
title: Architectures
date: {date}
question: >-
  Can networks of the common vision libraries be marked with default taps, and does a fresh build in
  another process read equal bits from the file, its bfloat16 copy and a prefixed copy?
outcome: {outcome}
summary: >-
  {equal} of {supported} supported architectures gave equal bits in all files; {refused} other networks
  were refused with an error that states the problem.
task: "30 random images, 5 classes, 32 or 64 pixels, random weights, spread head, N = 128"
commands:
  - 'uv run --dev --extra architectures pytest -m slow tests/architectures -n 0'
commits: []
hardware: 1 thread of 2 shared CPU cores with other work, torch 2.15, no GPU
seeds: [0]
n: 1
supersedes: []
superseded_by: []
"""
_NOTES = """\
# Architectures

## Method

Tree: {tree}.

Each network was built with random weights and marked with the spread head: 16 steps, batch 4. The
layers of mobilenetv4, dla46 and mnasnet are small: 16, 16 and 10 layers, and 96, 96 and 48 steps. A
second process, with another random state, built the architecture afresh and verified three files:
as saved, in bfloat16, and with the prefix `module.`. Of the other networks only the six layers with
most rows and at most 640 inputs were marked, because eigenvectors of wide layers take minutes on
one core. `layers` counts all layers that the head could mark. `first_stage` and `last_stage` are
the default taps of the keyed and the spread head. Numbers are matching bits of 128; `unmarked` is
the network before embedding.

## Result

{equal} of {supported} supported architectures gave equal bits in all files. Refused: {refused}.

## Decision

The test stays in the repository; the extra `architectures` installs its libraries.
"""


def main(rows_path: str, folder_path: str, tree: str) -> None:
    """Write `experiment.yaml`, `results.csv` and `notes.md`."""
    lines = Path(rows_path).read_text("utf-8").splitlines()
    rows: list[dict[str, Any]] = list({row["architecture"]: row for row in map(json.loads, lines)}.values())
    folder = Path(folder_path)
    folder.mkdir(parents=True, exist_ok=True)
    supported = [row for row in rows if ZOO[row["architecture"]].refusal is None]
    equal = [
        row
        for row in supported
        if row["embedded"] is not None and row["embedded"] == row["file"] == row["bf16"] == row["prefixed"]
    ]
    counts: dict[str, Any] = {"equal": len(equal), "supported": len(supported)}
    counts |= {"refused": len(rows) - len(supported), "tree": tree, "date": folder.name[:10]}
    counts["outcome"] = "positive" if len(equal) == len(supported) else "mixed"
    (folder / "experiment.yaml").write_text(_EXPERIMENT.format(**counts), "utf-8")
    (folder / "notes.md").write_text(_NOTES.format(**counts), "utf-8")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: str(row["architecture"])))


if __name__ == "__main__":
    main(*sys.argv[1:4])
