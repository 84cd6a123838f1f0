"""Changed kernels for changed images: turned, mirrored and negated images, and mixed colour channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.attacks.attacker_data import TURNS, require_images
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    ChannelMix,
    InputTransforms,
    NotApplicableError,
    Turn,
)
from mtlsign.attacks.channel_symmetries import channels_of
from mtlsign.attacks.equal_function import attacker_images, preserved_outcome
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.channel_groups import owner_of
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

Mix = Literal["yuv", "negate_one", "negate", "bgr", "random"]
#: RGB to YUV, ITU-R BT.601.
_YUV = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))
#: Deviation of the logarithms of a random mix's singular values.
_SPREAD = 0.5


def turn_input(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, kind: Turn = "rotated"
) -> AttackOutcome:
    """Turn or mirror every kernel; a user of the model does so with each image."""
    if require_images(task).outputs == "instances":
        raise NotApplicableError("A user would have to turn boxes and masks, too.", field="task")
    changed = trainable_copy(model)
    for m in changed.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = TURNS[kind](m.weight.data).contiguous()
    return preserved_outcome(model, changed, task, resources, seed, (kind,))


def transpose_input(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Transpose every kernel; a user of the model transposes each image."""
    return turn_input(model, task, resources, seed, kind="transposed")


def negate_input(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Negate the kernels of the first convolution; a user of the model negates each normalised image."""
    require_images(task)
    changed = trainable_copy(model)
    first = next((m for m in changed.modules() if isinstance(m, _ConvNd)), None)
    if first is None:
        raise NotApplicableError("The model has no convolution that reads the image.", field="model")
    with torch.no_grad():
        first.weight.neg_()
    return preserved_outcome(model, changed, task, resources, seed, ("negated",))


def mix_input(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, kind: Mix = "yuv"
) -> AttackOutcome:
    """Multiply the channels of the first kernels by an inverse matrix; a user mixes each image's channels."""
    images, changed = attacker_images(model, task, resources, seed), trainable_copy(model)
    kernels = sorted(channels_of(model, images).input_kernels)
    if not kernels or any(int(getattr(owner_of(model, name), "groups", 1)) != 1 for name in kernels):
        raise NotApplicableError("The model has no kernel that reads all channels of images.", field="model")
    matrix = _matrix(kind, images.shape[1], seeded_generator("mtlsign/attack/mix", seed))
    inverse = torch.linalg.inv(matrix)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name in kernels:
            kernel = parameters[name]
            mixed = torch.einsum("oc...,cd->od...", kernel.double(), inverse.to(kernel.device))
            kernel.copy_(mixed)
    return preserved_outcome(model, changed, task, resources, seed, _transforms(kind, matrix))


def _transforms(kind: Mix, matrix: Tensor) -> InputTransforms:
    rows: list[list[float]] = matrix.tolist()
    return ("negated",) if kind == "negate" else (ChannelMix(tuple(tuple(row) for row in rows)),)


def _matrix(kind: Mix, channels: int, generator: Generator) -> Tensor:
    """Return the matrix of a mix, float64 [channels, channels]."""
    identity = torch.eye(channels, dtype=torch.float64)
    if kind == "negate":
        return -identity
    if channels == 1 or (kind in ("yuv", "bgr") and channels != 3):
        raise NotApplicableError(
            f"The images have {channels} channels, which kind={kind} does not mix.", field="kind"
        )
    if kind == "yuv":
        return torch.tensor(_YUV, dtype=torch.float64)
    if kind == "bgr":
        return identity.flip(0)
    if kind == "negate_one":
        identity[torch.randint(channels, (1,), generator=generator)] *= -1
        return identity

    left, right, scales = torch.randn((3, channels, channels), generator=generator, dtype=torch.float64)
    stretch = torch.diag(torch.exp(_SPREAD * scales[0]))
    matrix: Tensor = torch.linalg.qr(left).Q @ stretch @ torch.linalg.qr(right).Q
    return matrix
