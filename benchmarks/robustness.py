"""Robustness study: embed on one task and seed, then attack; prints one JSON line.

    uv run benchmarks/robustness.py --task fashion-mnist --data DATA --width 16 --seed 0 [--set report]

The defaults are chosen by the attacks of `--set pick`. Results are reported for those of `--set report`,
which have other learning rates, lengths and ratios. W0 is stored in `--cache`, so that several settings start
from the same phase 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mtlsign.attacks import AttackerResources, parse_attacks
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.models.architectures import build
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import loop, pipeline
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Name -> expression, as `jobs/attack.py --attacks` takes it. Learning rates are parts of that of phase 1.
SETS: dict[str, dict[str, str]] = {
    "pick": {
        "tune lr/5, 4 epochs": "ftal:lr={fifth},epochs=4",
        "tune lr, 3 epochs": "ftal:lr=full,epochs=3",
        "annealed lr, 5 epochs": "retrain:epochs=5",
        "prune 70 %": "prune:ratio=0.7",
    },
    "report": {
        "tune lr/4, 3 epochs": "ftal:lr=quarter,epochs=3",
        "tune lr, 5 epochs": "ftal:lr=full,epochs=5",
        "annealed lr, 8 epochs": "retrain:epochs=8",
        "prune 60 %": "prune:ratio=0.6",
    },
}
#: Function-preserving changes, which cost the attacker nothing.
FREE = {
    "gauge": "bn_reparameterize",
    "folded": "bn_fold",
    "inner scaled": "scale_inner_channels",
    "stream scaled": "scale_residual_channels",
    "all": "scale_inner_channels+scale_residual_channels+bn_reparameterize+bn_fold",
}
#: Seed of the attacks.
_SEED = 7


def main() -> None:
    """Embed, attack, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, default="report", help="attacks to run")
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/.cache"), help="folder for W0")
    parser.add_argument("--key", type=int, default=0, help="number of the owner: use others to report")
    options, embed_flags = parser.parse_known_args()
    settings = cli.parse(EmbedSettings, embed_flags, description="").with_defaults()
    settings = settings.updated({"insecure_test_key": True})
    torch.set_num_threads(1)
    task, context = load_task(settings.task, data=settings.data, seed=settings.seed), SingleProcessContext()
    architecture = loading.architecture_from_settings(settings, task.input_spec)
    model = build(architecture)
    model.load_state_dict(base_model(settings, architecture, options.cache))
    base_weights = loading.cpu_state(model)
    # The words of the seed must not change: the key follows from them, and published results from the key.
    owner = Identity(hashlib.sha256(f"survival study {options.key}".encode()).digest(), bytes(32))
    bases = measure_response_bases(build(architecture), base_weights, task, settings)
    (opening,), reference = commit_keys(
        build(architecture), base_weights, architecture, task.input_spec, settings, owner, bases=bases
    )
    started = time.process_time()
    marked = pipeline.run_phase2(settings, base_weights, [opening], reference, context)
    cpu_seconds = time.process_time() - started
    detector = WatermarkDetector(opening, reference, head=marked.head)
    model.load_state_dict(marked.tensors)
    split = "test" if options.set == "report" else "validation"

    def row(network: nn.Module) -> dict[str, float]:
        verdict = verify(network.state_dict(), detector)
        accuracy = loop.evaluate(network, task, split, settings, context)
        return {"wm": verdict.accuracy, "bits": round(verdict.evidence_bits, 1), "primary": accuracy}

    result: dict[str, object] = {
        "settings": " ".join(embed_flags), "key": options.key, "set": options.set,
        "cpu_s": round(cpu_seconds),
    }  # fmt: skip
    result |= {name: round(value, 4) for name, value in marked.measured.items()}
    result["marked"], result["w0"] = row(model), verify(base_weights, detector).accuracy
    learning_rate = settings.phase1.lr or 0.1
    resources = AttackerResources(training_lr=learning_rate)
    for name, expression in SETS[options.set].items():
        attacked = attack(expression.format(fifth=learning_rate / 5), model, task, resources)
        result[name] = row(attacked)
        if name.startswith("tune lr/"):
            result["then"] = {
                change: verify(attack(text, attacked, task, resources).state_dict(), detector).accuracy
                for change, text in FREE.items()
            }
    print(json.dumps(result), flush=True)


def base_model(settings: EmbedSettings, architecture: Mapping[str, object], cache: Path) -> dict[str, Tensor]:
    """Return W0 from the cache; train and store it if it is missing."""
    name = (
        f"{settings.task}-{settings.model}-w{settings.width}-e{settings.phase1.epochs}-s{settings.seed}"
        ".safetensors"
    )
    path = cache / name
    if path.exists():
        return parse_safetensors(path.read_bytes())
    base_weights, _ = pipeline.run_phase1(settings, architecture, SingleProcessContext())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialize_safetensors(base_weights))
    return base_weights


def attack(expression: str, model: nn.Module, task: Task, resources: AttackerResources) -> nn.Module:
    """Run one attack; return the attacked model.

    Args:
        expression: the attack, as `jobs/attack.py --attacks` takes it.
        model: the marked model.
        task: the primary task.
        resources: data and learning rate of the attacker.
    """
    (plan,) = parse_attacks(expression)
    return plan.run(model, task, resources, seed=_SEED).model


if __name__ == "__main__":
    main()
