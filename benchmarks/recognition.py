"""Recognition study: which models a verifier recognises as descendants of W0, and how wrong keys score.

    uv run python -m benchmarks.recognition OUT.csv --task digits --width 16 --models 200 --keys 250

One network is marked with a spread head. Its descendants come from attacks with several seeds. Independent
networks of the same shape are trained with other seeds, and each is read through the whole alignment. The
first `--key-models` of them, W0, and W0 with permuted channels, are also read under `--keys` wrong keys.
Rows are appended to the file; a second call continues after the last one.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.marked_network import MarkedNetwork
from mtlsign.attacks import AttackerResources, parse_attacks
from mtlsign.attacks.base import AttackDivergedError, NotApplicableError
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.scores import matching_bits

#: Attacks that make descendants, each with every seed of `--attack-seeds`.
ATTACKS = (
    "none",
    "ftll",
    "ftal:lr=quarter",
    "ftal:lr=full",
    "retrain",
    "prune:ratio=0.5",
    "prune:ratio=0.7,bn=recalibrated",
    "prune:ratio=0.9,bn=recalibrated",
    "noise:sigma=0.4",
    "int4",
    "null_space:energy=0.9,noise=1",
    "low_rank:share=0.25",
    "tune:steps=500,lr=0.01",
    "tune:steps=500,lr=0.01,weight_decay=0.005",
    "ftal:lr=full+permute_channels+turn_input",
    "prune:ratio=0.7+permute_channels+negate_input",
    "noise:sigma=0.4+clique_channels",
    "relearn:epochs=20",
    "extract",
)
COLUMNS = ("group", "name", "seed", "keys", "similarity", "matches", "n", "status")
#: Seeds of independent networks begin here, far from those of the marked one.
_FIRST_SEED = 10_000


class Study:
    """The marked network, and the file of rows.

    Args:
        settings: complete settings of the embedding.
        path: CSV file.
    """

    def __init__(self, settings: EmbedSettings, path: Path) -> None:
        self.network, self.path = MarkedNetwork(settings, "recognition study"), path

    def rows(self, models: int, key_models: int, keys: int, attack_seeds: int) -> Iterator[dict[str, object]]:
        """Yield the rows that the file does not have."""
        finished = self._finished()
        for name in ATTACKS:
            for seed in range(attack_seeds):
                if ("descendant", name, str(seed)) not in finished:
                    yield from self._descendant(name, seed)
        for index in range(models):
            key_count = keys if index < key_models else 0
            if ("independent", "trained", str(_FIRST_SEED + index)) not in finished:
                tensors = self.network.train(_FIRST_SEED + index)
                yield from self._read("independent", "trained", _FIRST_SEED + index, tensors, key_count)
        for name, tensors in self._unmarked():
            if ("unmarked", name, "0") not in finished:
                yield from self._read("unmarked", name, 0, tensors, keys)

    def _finished(self) -> set[tuple[str, str, str]]:
        if not self.path.exists():
            return set()
        with self.path.open() as file:
            return {(row["group"], row["name"], row["seed"]) for row in csv.DictReader(file)}

    def _descendant(self, name: str, seed: int) -> Iterator[dict[str, object]]:
        (plan,) = parse_attacks(name)
        resources = AttackerResources(training_lr=self.network.settings.phase1.lr or 0.1)
        try:
            outcome = plan.run(self.network.marked, self.network.task, resources, seed)
        except (AttackDivergedError, NotApplicableError):
            return
        tensors = outcome.model.state_dict() if outcome.tensors is None else dict(outcome.tensors)
        yield from self._read("descendant", name, seed, tensors, 0)

    def _unmarked(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        base = self.network.base_weights
        yield "W0", base
        (plan,) = parse_attacks("permute_channels:which=both")
        permuted = plan.run(self.network.build(base), self.network.task, AttackerResources(), 0).model
        yield "W0 permuted", permuted.state_dict()

    def _read(
        self, group: str, name: str, seed: int, tensors: dict[str, Tensor], keys: int
    ) -> Iterator[dict[str, object]]:
        """Yield the row of the owner's key, and rows with the numbers of matching bits of wrong keys."""
        detector = self.network.detector
        verdict = verify(tensors, detector)
        shared = {"group": group, "name": name, "seed": seed, "similarity": round(verdict.similarity, 4)}
        yield {**shared, "keys": 0, "matches": verdict.matches, "n": verdict.n, "status": verdict.status}
        if keys:
            others = [detector.with_control_key(index) for index in range(keys)]
            results = detector.score_all_keys(tensors, others)[1:]
            counts = [
                [
                    int(matching_bits(own.scores, other.labels).sum())
                    for own in own_results
                    if own.scores is not None
                ]
                for own_results, other in zip(results, others, strict=True)
            ]
            for status, matches in (
                ("wrong keys, last reading", [own[-1] for own in counts]),
                ("wrong keys, best reading", [max(own) for own in counts]),
            ):
                text = " ".join(map(str, matches))
                yield {**shared, "keys": keys, "matches": text, "n": verdict.n, "status": status}


def main() -> None:
    """Append rows to the file; settings of the embedding follow those of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--key-models", type=int, default=20)
    parser.add_argument("--keys", type=int, default=250)
    parser.add_argument("--attack-seeds", type=int, default=3)
    options, embed_flags = parser.parse_known_args()
    settings = cli.parse(EmbedSettings, embed_flags, description="").with_defaults()
    torch.set_num_threads(1)
    study = Study(settings.updated({"insecure_test_key": True}), options.output)
    new = not options.output.exists()
    with options.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in study.rows(options.models, options.key_models, options.keys, options.attack_seeds):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
