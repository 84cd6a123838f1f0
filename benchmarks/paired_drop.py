"""Accuracy drop of marked classifiers against their W0, paired over the test samples.

```sh
uv run python -m benchmarks.paired_drop --task imdb --data DATA --clean W0.safetensors MODEL [MODEL …]
```

Two networks with equal predictions have no difference, so that the interval depends on the samples on
which they disagree alone.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from mtlsign.models import architectures
from mtlsign.models.loading import custom_factories, load_tensors
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.tasks.base import forward_inputs


@torch.no_grad()
def test_logits(path: Path, architecture: dict[str, object], task: Task) -> tuple[Tensor, Tensor]:
    """Return logits float32 [n, classes] and labels int64 [n] of the test split."""
    model = architectures.build(architecture, factories=custom_factories(architecture))
    load_tensors(model, parse_safetensors(path.read_bytes()))
    model.eval()
    logits, labels = [], []
    for batch in task.batches("test", task.evaluation_batch, shuffle=False):
        logits.append(task.logits_of(forward_inputs(model, batch)).float())
        labels.append(batch.targets)
    return torch.cat(logits), torch.cat(labels)


def paired_drop(clean: Tensor, marked: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare two classifiers on the same samples.

    Args:
        clean: logits of W0, [n, classes].
        marked: logits of the marked network, [n, classes].
        labels: int64 [n].

    Returns:
        `clean` and `marked`, the accuracies; `drop` and `half_width`, points, the mean of the paired
        differences and half of its 95 % interval (normal approximation); `disagreement`, the fraction of
        samples with different predictions; `kl`, the mean KL(clean || marked) in nats.
    """
    right = [logits.argmax(1) == labels for logits in (clean, marked)]
    difference = 100 * (right[0].double() - right[1].double())
    half_width = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    log_p, log_q = clean.double().log_softmax(1), marked.double().log_softmax(1)
    return {
        "clean": float(right[0].double().mean()),
        "marked": float(right[1].double().mean()),
        "drop": float(difference.mean()),
        "half_width": half_width,
        "disagreement": float((clean.argmax(1) != marked.argmax(1)).double().mean()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
    }


def main() -> None:
    """Print one JSON line for each marked model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("task", "data", "clean"):
        parser.add_argument(f"--{name}", required=name != "data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the embedding job")
    parser.add_argument("models", nargs="+", type=Path)
    options = parser.parse_args()
    task = load_task(options.task, data=options.data, tokenizer=options.tokenizer, seed=options.seed)
    architecture = json.loads((options.models[0] / "config.json").read_text())["architecture"]
    clean, labels = test_logits(Path(options.clean), architecture, task)
    for model in options.models:
        marked, _ = test_logits(model / "model.safetensors", architecture, task)
        print(json.dumps({"model": model.name[:16], **paired_drop(clean, marked, labels)}), flush=True)


if __name__ == "__main__":
    main()
