"""Tiny networks and renamed tensors for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.models.architectures import architecture_for, build


def network(arch: str = "resnet18", classes: int = 10, width: int = 4) -> Any:
    return build(architecture_for(arch, channels=1, classes=classes, width=width, stem="cifar"))


def is_equal(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def transformers_name(name: str) -> str:
    """Inverse of the package's table, written independently: torchvision's names -> transformers'."""
    parts = name.split(".")
    leaf = parts[-1]
    if parts[0] == "fc":
        return f"classifier.1.{leaf}"
    if parts[0] in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}.{leaf}"
    block = f"resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}.shortcut.{'convolution' if parts[3] == '0' else 'normalization'}.{leaf}"
    kind = "convolution" if parts[2].startswith("conv") else "normalization"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{kind}.{leaf}"
