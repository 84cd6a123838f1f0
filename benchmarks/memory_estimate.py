"""Benchmark of the estimate of memory: estimated and measured bytes of whole embeddings. Linux only (VmHWM).

    uv run python -m benchmarks.memory_estimate [NAME …]

Each embedding runs in a child process with one thread, on random inputs, with one epoch of one batch and two
steps of phase 2. Measured bytes are the peak of resident memory less that before the embedding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import mtlsign
from benchmarks.memory import MALLOC, status_bytes
from mtlsign.config.embed import EmbedSettings
from mtlsign.models.architectures import build
from mtlsign.models.input_spec import ImageSpec, InputSpec, TextSpec
from mtlsign.models.loading import architecture_from_settings
from mtlsign.watermark.embedding.memory import estimate_memory
from mtlsign.watermark.keys.identity import Identity

_MIB = 2**20
_TEXTS = TextSpec(vocabulary=13_775, embedding=50, length=56, classes=2)


@dataclass(frozen=True)
class Case:
    """One embedding.

    Attributes:
        model: architecture.
        inputs: of the task.
        width: of the network; None for networks without one.
        batch: primary samples of a step, in both phases.
        options: further settings.
    """

    model: str
    inputs: InputSpec
    width: int | None
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict)


_PHOTOS = ImageSpec(3, 224, 224, 10)
_SCENES = ImageSpec(3, 180, 240, 3, outputs="instances")
_ALWAYS = {"activation_checkpointing": "always"}
CASES = {
    "resnet18-w16-28": Case("resnet18", ImageSpec(1, 28, 28, 10), 16, 128),
    "resnet18-w64-32": Case("resnet18", ImageSpec(3, 32, 32, 10), 64, 128),
    "resnet18-w64-32-checkpointing": Case("resnet18", ImageSpec(3, 32, 32, 10), 64, 512, _ALWAYS),
    "resnet18-w16-64-keyed": Case("resnet18", ImageSpec(3, 64, 64, 10), 16, 16, {"head": "keyed"}),
    "resnet50-224-16": Case("resnet50", _PHOTOS, 64, 16),
    "resnet50-224-32-checkpointing": Case("resnet50", _PHOTOS, 64, 32, _ALWAYS),
    "resnet50-224-128": Case("resnet50", _PHOTOS, 64, 128),
    "resnet50-224-128-checkpointing": Case("resnet50", _PHOTOS, 64, 128, _ALWAYS),
    "bilstm-56": Case("bilstm", _TEXTS, 64, 128),
    "transformer-56": Case("transformer", _TEXTS, 64, 128),
    "cascade-resnet18-w16-240": Case("cascade-resnet18", _SCENES, 16, 8),
    "cascade-resnet50-w64-240": Case("cascade-resnet50", _SCENES, 64, 4),
    "cascade-efficientnet-lite0-240": Case("cascade-timm/tf_efficientnet_lite0", _SCENES, 16, 4),
    "vit-tiny-32": Case("timm/vit_tiny_patch16_224", ImageSpec(3, 32, 32, 10), None, 32),
}


def _settings(case: Case) -> EmbedSettings:
    options: dict[str, Any] = {
        "task": "custom", "model": case.model, "key_size": 128, "phase1.epochs": 1,
        "phase1.batch": case.batch, "phase2.batch": case.batch, "phase2.steps": 2,
        "insecure_test_key": True, "width": case.width,
    }  # fmt: skip
    if case.options.get("head") == "keyed":
        options["key_size"] = 1024
    return EmbedSettings.of(options | dict(case.options)).with_defaults()


def child(name: str) -> dict[str, float]:
    """Run one embedding; return its estimated and measured bytes and its seconds."""
    case = CASES[name]
    settings = _settings(case)
    architecture = architecture_from_settings(settings, case.inputs)
    checkpointing = settings.activation_checkpointing == "always"
    estimate = estimate_memory(settings, architecture, case.inputs, checkpointing=checkpointing)
    assert estimate is not None
    torch.manual_seed(0)
    network, loader = build(architecture), _batches(case)
    keys = {"task", "model"}
    options = {k: v for k, v in settings.given_values().items() if k not in keys}
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status_bytes("VmRSS"), time.process_time()
    mtlsign.embed(
        network, {"train": loader, "test": loader[:1]}, identity=Identity(bytes(32), bytes(32)),
        architecture=architecture, classes=case.inputs.classes, **options,
    )  # fmt: skip
    measured = status_bytes("VmHWM") - before
    return {"estimated": estimate.peak, "measured": measured, "seconds": time.process_time() - started}


def _objects(spec: ImageSpec, count: int = 40) -> dict[str, Tensor]:
    """Return the target of an image with more objects than a detector samples for its masks."""
    corners = torch.rand(count, 2) * torch.tensor([spec.width - 60.0, spec.height - 60.0])
    masks = torch.ones(count, spec.height, spec.width, dtype=torch.uint8)
    return {
        "boxes": torch.cat([corners, corners + 50], 1),
        "labels": torch.ones(count).long(),
        "masks": masks,
    }


class _Scenes(Dataset[Any]):
    """Images and targets; a part of it is a dataset as well."""

    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return _Scenes(self._samples[index]) if isinstance(index, slice) else self._samples[index]


def _batches(case: Case) -> Any:
    """Return two random batches of the case's inputs, or a dataset of as many samples."""
    spec = case.inputs
    size = (case.batch,)
    if isinstance(spec, TextSpec):
        shape: tuple[int, ...] = (*size, spec.length)
        return [(torch.randint(1, spec.vocabulary, shape), torch.randint(0, 2, size)) for _ in range(2)]
    assert isinstance(spec, ImageSpec)
    shape = (spec.channels, spec.height, spec.width)
    if spec.outputs == "instances":
        return _Scenes([(torch.rand(*shape), _objects(spec)) for _ in range(2 * case.batch)])
    return [(torch.rand(*size, *shape), torch.randint(0, 10, size)) for _ in range(2)]


def main(names: list[str]) -> None:
    """Run the named cases, or all, and print a row for each."""
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        "import json, sys; import torch; torch.set_num_threads(1); from benchmarks import memory_estimate; "
        "print(json.dumps(memory_estimate.child(sys.argv[1])))"
    )
    for name in names or list(CASES):
        process = subprocess.run(
            [sys.executable, "-c", code, name],
            env={**os.environ, **MALLOC, "PYTHONPATH": root},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if process.returncode:
            print(f"{name}: failed\n{process.stderr[-2000:]}", flush=True)
            continue
        row = json.loads(process.stdout.splitlines()[-1])
        estimated, measured = row["estimated"] / _MIB, row["measured"] / _MIB
        ratio = estimated / measured
        print(f"{name:34} {estimated:7.0f} {measured:7.0f} {ratio:5.2f} {row['seconds']:6.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
