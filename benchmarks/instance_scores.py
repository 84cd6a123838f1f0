"""Box and mask average precision of detectors, and their difference over drawn evaluation sets.

```sh
uv run python -m benchmarks.instance_scores --task camvid@0.25 --data DATA --clean W0.safetensors \
  --marked MODEL/model.safetensors --architecture MODEL/config.json
```
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from mtlsign.models import architectures
from mtlsign.models.loading import load_tensors
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.tasks.segmentation.average_precision import InstanceMetric

#: Evaluation sets that are drawn from the test images with replacement.
DRAWS = 200


@torch.no_grad()
def metric_of(path: Path, architecture: dict[str, object], task: Task) -> InstanceMetric:
    """Return the metric with the detections of a model file on the test split."""
    model = architectures.build(architecture)
    load_tensors(model, parse_safetensors(path.read_bytes()))
    model.eval()
    metric = InstanceMetric()
    for batch in task.batches("test", task.evaluation_batch, shuffle=False):
        metric.update(task.predictions(model, batch), batch.targets)
    return metric


def main() -> None:
    """Print the scores of both models, and mean and deviation of the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("task", "data", "clean", "marked", "architecture"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    task = load_task(given.task, data=given.data)
    architecture = json.loads(Path(given.architecture).read_text())["architecture"]
    metrics = {
        name: metric_of(Path(getattr(given, name)), architecture, task) for name in ("clean", "marked")
    }
    for name, metric in metrics.items():
        print(name, json.dumps(metric.scores()))
    gen = torch.Generator().manual_seed(0)
    drops = []
    for _ in range(DRAWS):
        rows = torch.randint(task.size("test"), (task.size("test"),), generator=gen).tolist()
        drawn = {name: metric.drawn(rows).scores() for name, metric in metrics.items()}
        drops.append([100 * (drawn["clean"][key] - drawn["marked"][key]) for key in drawn["clean"]])
    drop = torch.tensor(drops)
    for index, key in enumerate(metrics["clean"].scores()):
        own = drop[:, index]
        print(f"drop of {key} in points: mean {own.mean():.2f}, sd {own.std():.2f}, {DRAWS} draws")


if __name__ == "__main__":
    main()
