"""Does the mark outlive tuning and free changes? Embeds on one task and seed, then attacks; one JSON line.

    uv run benchmarks/survival.py --task fashion-mnist --data DATA --width 16 --seed 0 [--set report]

`--set pick` holds the attacks that defaults are chosen by, `--set report` the ones that are reported: other
rates, lengths and ratios. W0 is kept in `--cache` so that several settings start from one phase 1.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from symmetries import State, batch_norm_gauge, fold, scale_inner, scale_stream
from torch import nn
from torch.nn import functional as F

from mtlsign import cli, embedding, phases
from mtlsign.backbone import build
from mtlsign.key import Identity
from mtlsign.progress import Alone
from mtlsign.settings import EmbedSettings
from mtlsign.tasks import Task, load_task
from mtlsign.tensors import read_tensors, tensor_bytes
from mtlsign.verification import Probe, verify


def tune(model: nn.Module, task: Task, lr: float, epochs: int, *, anneal: bool = False) -> nn.Module:
    """FTAL on the attacker's part: SGD, momentum 0.9, weight decay 5e-4, batch 128, augmented."""
    tuned = copy.deepcopy(model).requires_grad_(True).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps, done = epochs * task.steps("attacker", 128), 0
    for epoch in range(epochs):
        for x, y in task.batches("attacker", 128, epoch=epoch, seed=7, augment=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2 if anneal else lr
            optimizer.zero_grad()
            F.cross_entropy(tuned(x), y).backward()
            optimizer.step()
            done += 1
    return tuned


def prune(model: nn.Module, ratio: float) -> nn.Module:
    """Each weight tensor's smallest magnitudes set to 0, nothing recalibrated."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for p in pruned.parameters():
            if p.dim() > 1:
                cut = torch.kthvalue(p.abs().flatten(), max(1, int(ratio * p.numel()))).values
                p.mul_(p.abs() > cut)
    return pruned


SETS: dict[str, dict[str, Callable[[nn.Module, Task, float], nn.Module]]] = {
    "pick": {
        "tune lr/5, 4 epochs": lambda m, t, lr: tune(m, t, lr / 5, 4),
        "tune lr, 3 epochs": lambda m, t, lr: tune(m, t, lr, 3),
        "annealed lr, 5 epochs": lambda m, t, lr: tune(m, t, lr, 5, anneal=True),
        "prune 70 %": lambda m, t, lr: prune(m, 0.7),
    },
    "report": {
        "tune lr/4, 3 epochs": lambda m, t, lr: tune(m, t, lr / 4, 3),
        "tune lr, 5 epochs": lambda m, t, lr: tune(m, t, lr, 5),
        "annealed lr, 8 epochs": lambda m, t, lr: tune(m, t, lr, 8, anneal=True),
        "prune 60 %": lambda m, t, lr: prune(m, 0.6),
    },
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
    s = (
        cli.parse(EmbedSettings, rest, description="")
        .resolved()
        .model_copy(update={"insecure_test_key": True})
    )
    torch.set_num_threads(1)
    task, rank = load_task(s.task, data=s.data, seed=s.seed), Alone()
    graph = embedding.graph_of(s, embedding.TaskShape(task.channels, task.height, task.width, task.classes))
    model = build(graph)
    kept = mine.cache / f"{s.task}-{s.model}-w{s.width}-e{s.epochs}-s{s.seed}.safetensors"
    if kept.exists():
        model.load_state_dict(read_tensors(kept.read_bytes()))
    else:
        w0, _ = embedding.clean_phase(s, graph, rank)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(tensor_bytes(w0))
        model.load_state_dict(w0)
    w0 = embedding.cpu_state(model)
    owner = Identity(hashlib.sha256(f"survival study {mine.key}".encode()).digest(), bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = embedding.commit(build(graph), w0, graph, geometry, s, owner)
    started = time.process_time()
    marked = embedding.mark_phase(s, w0, opening, reference, rank)
    spent = time.process_time() - started
    probe = Probe(opening, reference, head=marked.head)
    model.load_state_dict(marked.tensors)

    def row(network: nn.Module) -> dict[str, float]:
        verdict = verify(network.state_dict(), probe)
        accuracy = phases.evaluate(network, task, "test" if mine.set == "report" else "validation", s, rank)
        return {"wm": verdict.accuracy, "bits": round(verdict.evidence_bits, 1), "primary": accuracy}

    result: dict[str, object] = {
        "settings": " ".join(rest),
        "key": mine.key,
        "set": mine.set,
        "cpu_s": round(spent),
    }
    result |= {k: round(v, 4) for k, v in marked.measured.items()}
    result["marked"], result["w0"] = row(model), verify(w0, probe).accuracy
    for name, attack in SETS[mine.set].items():
        attacked = attack(model, task, s.lr or 0.1)
        result[name] = row(attacked)
        if name.startswith("tune lr/"):
            result["then"] = free_changes(embedding.cpu_state(attacked), probe)
    print(json.dumps(result), flush=True)


def free_changes(state: State, probe: Probe) -> dict[str, float]:
    """WM accuracy after each change that costs a thief nothing."""
    g = torch.Generator().manual_seed(1)
    changed = {
        "gauge": batch_norm_gauge(state, g),
        "folded": fold(state),
        "inner scaled": scale_inner(state, g),
        "stream scaled": scale_stream(state, g),
        "all": fold(batch_norm_gauge(scale_stream(scale_inner(state, g), g), g)),
    }
    return {name: verify(tensors, probe).accuracy for name, tensors in changed.items()}


if __name__ == "__main__":
    sys.exit(main())
