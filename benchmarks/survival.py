"""Does the mark outlive tuning and free changes? Embeds on one task and seed, then attacks; one JSON line.

    uv run benchmarks/survival.py --task fashion-mnist --data DATA --width 16 --seed 0 [--set report]

`--set pick` holds the attacks that defaults are chosen by, `--set report` the ones that are reported: other
rates, lengths and ratios. W0 is kept in `--cache` so that several settings start from one phase 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from mtlsign.attacks import AttackerResources, parse_attacks
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.models.architectures import build
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import loop, pipeline
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.detector import WatermarkDetector, verify

#: Name -> what `--attacks` would take, with rates as parts of phase 1's.
SETS: dict[str, dict[str, str]] = {
    "pick": {
        "tune lr/5, 4 epochs": "ftal:lr={fifth},epochs=4",
        "tune lr, 3 epochs": "ftal:lr=full,epochs=3",
        "annealed lr, 5 epochs": "annealed:epochs=5",
        "prune 70 %": "prune:ratio=0.7",
    },
    "report": {
        "tune lr/4, 3 epochs": "ftal:lr=quarter,epochs=3",
        "tune lr, 5 epochs": "ftal:lr=full,epochs=5",
        "annealed lr, 8 epochs": "annealed:epochs=8",
        "prune 60 %": "prune:ratio=0.6",
    },
}
#: Changes that cost a thief nothing.
FREE = {
    "gauge": "bn_gauge",
    "folded": "bn_fold",
    "inner scaled": "scale_inner",
    "stream scaled": "scale_stream",
    "all": "scale_inner+scale_stream+bn_gauge+bn_fold",
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, default="report")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache"))
    parser.add_argument(
        "--key", type=int, default=0, help="which owner: keys for picking and reporting differ"
    )
    mine, rest = parser.parse_known_args()
    settings = (
        cli.parse(EmbedSettings, rest, description="")
        .resolved()
        .model_copy(update={"insecure_test_key": True})
    )
    torch.set_num_threads(1)
    task, rank = load_task(settings.task, data=settings.data, seed=settings.seed), SingleProcessContext()
    graph = loading.architecture_from_settings(
        settings, loading.InputSpec(task.channels, task.height, task.width, task.classes)
    )
    model = build(graph)
    kept = (
        mine.cache
        / f"{settings.task}-{settings.model}-w{settings.width}-e{settings.epochs}-s{settings.seed}.safetensors"
    )
    if kept.exists():
        model.load_state_dict(parse_safetensors(kept.read_bytes()))
    else:
        base_weights, _ = pipeline.run_phase1(settings, graph, rank)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(serialize_safetensors(base_weights))
        model.load_state_dict(base_weights)
    base_weights = loading.cpu_state(model)
    owner = Identity(hashlib.sha256(f"survival study {mine.key}".encode()).digest(), bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = pipeline.commit_key(build(graph), base_weights, graph, geometry, settings, owner)
    started = time.process_time()
    marked = pipeline.run_phase2(settings, base_weights, opening, reference, rank)
    spent = time.process_time() - started
    detector = WatermarkDetector(opening, reference, head=marked.head)
    model.load_state_dict(marked.tensors)

    def row(network: nn.Module) -> dict[str, float]:
        verdict = verify(network.state_dict(), detector)
        accuracy = loop.evaluate(
            network, task, "test" if mine.set == "report" else "validation", settings, rank
        )
        return {"wm": verdict.accuracy, "bits": round(verdict.evidence_bits, 1), "primary": accuracy}

    result: dict[str, object] = {
        "settings": " ".join(rest),
        "key": mine.key,
        "set": mine.set,
        "cpu_s": round(spent),
    }
    result |= {k: round(v, 4) for k, v in marked.measured.items()}
    result["marked"], result["w0"] = row(model), verify(base_weights, detector).accuracy
    budget = AttackerResources(lr=settings.lr or 0.1)
    for name, text in SETS[mine.set].items():
        attacked = attack(text.format(fifth=budget.lr / 5), model, task, budget)
        result[name] = row(attacked)
        if name.startswith("tune lr/"):
            result["then"] = {
                free: verify(attack(change, attacked, task, budget).state_dict(), detector).accuracy
                for free, change in FREE.items()
            }
    print(json.dumps(result), flush=True)


def attack(text: str, model: nn.Module, task: Task, budget: AttackerResources) -> nn.Module:
    """One attack, as `jobs/attack.py --attacks` takes it."""
    (order,) = parse_attacks(text)
    return order.run(model, task, budget, seed=7).model


if __name__ == "__main__":
    sys.exit(main())
