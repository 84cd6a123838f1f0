"""Study of free changes: whether damaged copies of a marked network keep their bits in every rewritten form.

    uv run python -m benchmarks.rewritings OUT.csv --task cifar10 --data DATA --model timm/regnetx_002

One network is trained and marked. Each of `--suspects` (attack expressions) damages it, and each of
`--changes` rewrites the damaged network without a change of its function. All are verified without control
keys. Rows are appended to the file; a second call with the same seed trains the same network and continues
after the last row. `--summary` writes one row per change from all rows of the files.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from torchvision.models.vgg import make_layers

from benchmarks.marked_network import MarkedNetwork
from mtlsign.attacks import AttackerResources, parse_attacks
from mtlsign.attacks.base import AttackOutcome, NotApplicableError
from mtlsign.attacks.file_rewriting import Form
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding.loop import evaluate
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.verification.algorithm import verify

SUSPECTS = ("none", "ftal:lr=full,epochs=3", "prune:ratio=0.7,bn=recalibrated", "noise:sigma=0.4")
_TURNS = ("transpose_input", *(f"turn_input:kind={kind}" for kind in ("flipped_columns", "rotated")))
_MIXES = tuple(f"mix_input:kind={kind}" for kind in ("negate_one", "yuv"))
_CHANGES_OF_CHANNELS = (
    "permute_channels",
    *(f"permute_channels+{name}" for name in (*_TURNS, "negate_input", *_MIXES)),
    "scale_filters+scale_inner_channels+scale_residual_channels",
    "permute_channels+bn_fold:decoys=signs",
    "dummy_channels:count=16",
    "split_channels:count=16",
    "clique_channels:count=16",
)
#: Changes that keep the function, as attack expressions; `none` is the suspect as it is.
CHANGES = ("none", *_CHANGES_OF_CHANNELS, *(f"rewrite_file:form={form}" for form in get_args(Form)))
COLUMNS = (
    "model", "task", "seed", "suspect", "change", "accuracy", "status", "matches", "n", "evidence", "seconds"
)  # fmt: skip


def small_vgg(channels: int, classes: int) -> nn.Module:
    """Return a VGG of width 16 to 64 without batch norms: `--model benchmarks.rewritings:small_vgg`."""
    layers = make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M"], batch_norm=False)
    layers[0] = nn.Conv2d(channels, 16, 3, padding=1)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class Study:
    """The marked network, and the file of rows.

    Args:
        settings: complete settings of the embedding.
        path: CSV file.
    """

    def __init__(self, settings: EmbedSettings, path: Path) -> None:
        self.settings, self.path = settings, path
        name = str(settings.model)
        self.model = f"{name} of width {settings.width}" if name.startswith("resnet") else name
        self.network = MarkedNetwork(settings, "rewriting study")

    def rows(self, suspects: list[str], changes: list[str]) -> Iterator[dict[str, object]]:
        """Yield the rows that the file does not have."""
        finished = self._finished()
        for suspect in suspects:
            missing = [change for change in changes if (suspect, change) not in finished]
            if not missing:
                continue
            damaged = self._run(suspect, self.network.marked).model.eval()
            context = SingleProcessContext()
            accuracy = evaluate(damaged, self.network.task, "test", self.settings, context)
            for change in missing:
                shared = {"model": self.model, "task": self.settings.task, "seed": self.settings.seed}
                shared |= {"suspect": suspect, "change": change, "accuracy": round(accuracy, 4)}
                yield {**shared, **self._read(change, damaged)}

    def _finished(self) -> set[tuple[str, str]]:
        if not self.path.exists():
            return set()
        own = (self.model, str(self.settings.seed))
        with self.path.open() as file:
            rows = [row for row in csv.DictReader(file) if (row["model"], row["seed"]) == own]
        return {(row["suspect"], row["change"]) for row in rows}

    def _run(self, expression: str, model: nn.Module) -> AttackOutcome:
        (plan,) = parse_attacks(expression)
        resources = AttackerResources(training_lr=self.settings.phase1.lr or 0.1)
        return plan.run(model, self.network.task, resources, self.settings.seed)

    def _read(self, change: str, damaged: nn.Module) -> dict[str, object]:
        """Return the verdict on a rewritten network; the status states why a change does not apply."""
        try:
            outcome = self._run(change, damaged)
        except NotApplicableError:
            return {"status": "not applicable"}
        tensors = outcome.model.state_dict() if outcome.tensors is None else dict(outcome.tensors)
        start = time.process_time()
        verdict = verify(tensors, self.network.detector)
        seconds = round(time.process_time() - start, 2)
        shared = {"status": verdict.status, "matches": verdict.matches, "n": verdict.n, "seconds": seconds}
        return {**shared, "evidence": round(verdict.evidence_bits, 1)}


def write_summary(rows: list[dict[str, str]], path: Path) -> None:
    """Write a row for each change: fewest bits of any model, and the bits that the change took.

    Args:
        rows: rows of the study, of any number of networks.
        path: CSV file.
    """
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["change"]].append(row)
    before = {(row["model"], row["seed"], row["suspect"]): row for row in groups["none"]}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            (
                "change",
                "networks",
                "suspects",
                "bits after less before",
                "evidence, fewest",
                "CPU seconds, most",
            )
        )
        for change, own in groups.items():
            readable = [row for row in own if row["matches"]]
            if not readable:
                continue
            lost = [
                int(row["matches"]) - int(before[(row["model"], row["seed"], row["suspect"])]["matches"])
                for row in readable
            ]
            writer.writerow((
                change, len({(row["model"], row["seed"]) for row in readable}), len(readable),
                f"{min(lost)} … {max(lost)}", min(float(row["evidence"]) for row in readable),
                max(float(row["seconds"]) for row in readable),
            ))  # fmt: skip


def _rows_of(paths: list[Path]) -> list[dict[str, str]]:
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def main() -> None:
    """Append rows to the file; settings of the embedding follow those of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="+")
    parser.add_argument("--suspects", nargs="+", default=list(SUSPECTS))
    parser.add_argument("--changes", nargs="+", default=list(CHANGES))
    parser.add_argument("--summary", type=Path, help="write a table of the rows in the files, and stop")
    options, embed_flags = parser.parse_known_args()
    if options.summary is not None:
        write_summary(_rows_of(options.output), options.summary)
        return
    (output,) = options.output
    settings = cli.parse(EmbedSettings, embed_flags, description="").with_defaults()
    torch.set_num_threads(1)
    study = Study(settings.updated({"insecure_test_key": True}), output)
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in study.rows(options.suspects, options.changes):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
