"""Function-preserving changes: reparametrisations that cost the attacker nothing.

The outputs of every changed model are compared with those of the marked model in float64 on a few images of
the attacker. A change of the function makes the attack not applicable.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view, transform_inputs
from mtlsign.attacks.base import AttackerResources, AttackOutcome, InputTransforms, NotApplicableError
from mtlsign.attacks.training import trainable_copy
from mtlsign.errors import ModelError
from mtlsign.models import channel_groups
from mtlsign.models.channel_groups import ChannelGroup, batch_norm_of_conv, find_channel_groups
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

#: Largest difference of the outputs, relative to the largest output if that is above 1.
TOLERANCE = 1e-5

Which = Literal["inner", "residual", "both"]
#: Labels of the places in random seeds, which never change.
SEED_LABELS = {"inner": "inner", "residual": "stream"}


def bn_reparameterize(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Reparametrise batch norms: (gamma, var) -> (a gamma, a^2 var), (mean, beta) -> (mean + t, beta + c).

    a > 0 and t are random; c = gamma t / sqrt(var).
    """
    gen, changed = seeded_generator("mtlsign/attack/gauge", seed), trainable_copy(model)
    with torch.no_grad():
        for m in _norms(changed):
            var = m.running_var + m.eps
            # a smaller a would need a negative variance
            a = torch.maximum(_positive(m.weight, gen), (m.eps / var).sqrt())
            t = torch.randn(len(var), generator=gen).to(var)
            m.bias.add_(m.weight * t / var.sqrt())
            m.running_mean.add_(t)
            m.weight.mul_(a)
            m.running_var.copy_((a**2 * var - m.eps).clamp(min=0))
    return _preserved(model, changed, task, resources, seed)


def scale_filters(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Scale kernel rows by factors of either sign; the batch norm removes the scale, gamma gets the sign."""
    gen, changed = seeded_generator("mtlsign/attack/rows", seed), trainable_copy(model)
    modules = dict(changed.named_modules())
    with torch.no_grad():
        for conv, norm in _pairs(changed, task, resources, seed).items():
            layer, m = modules[conv], modules[norm]
            assert isinstance(layer, _ConvNd) and isinstance(m, _BatchNorm)
            if m.weight is None or m.running_var is None or m.running_mean is None:
                continue
            var = m.running_var + m.eps
            size = torch.maximum(_positive(m.weight, gen), (m.eps / var).sqrt())
            sign = (torch.randint(2, (len(var),), generator=gen) * 2 - 1).to(var)
            layer.weight.mul_((size * sign).reshape(-1, *([1] * (layer.weight.dim() - 1))))
            if layer.bias is not None:
                layer.bias.mul_(size * sign)
            m.running_mean.mul_(size * sign)
            m.running_var.copy_((size**2 * var - m.eps).clamp(min=0))
            m.weight.mul_(sign)
    return _preserved(model, changed, task, resources, seed)


def bn_fold(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    decoys: Literal["none", "signs"] = "none",
) -> AttackOutcome:
    """Fold batch norms into their convolutions, which get biases; no batch norm remains.

    With `decoys=signs` the file still holds a gamma of random sign under its old name, which nothing uses.
    """
    changed = trainable_copy(model)
    gen = seeded_generator("mtlsign/attack/decoys", seed)
    for conv, norm in _pairs(changed, task, resources, seed).items():
        layer, m = changed.get_submodule(conv), changed.get_submodule(norm)
        plain = type(m) is nn.BatchNorm2d
        rest = [part for part in (getattr(m, "drop", None), getattr(m, "act", None)) if part is not None]
        if not isinstance(layer, nn.Conv2d) or not isinstance(m, nn.BatchNorm2d) or not (plain or rest):
            raise NotApplicableError(
                f"{norm!r} is a {type(m).__name__}, which does more than normalise. Nothing is folded.",
                field="model",
            )
        # batch norms of timm contain an activation
        replacement: nn.Module = nn.Identity() if plain else nn.Sequential(*rest)
        if decoys == "signs" and plain:
            signs = (torch.randint(2, (m.num_features,), generator=gen) * 2 - 1).to(m.weight)
            replacement = _UnusedWeight(signs * m.weight.detach().abs())
        _replace(changed, conv, fuse_conv_bn_eval(layer, m))
        _replace(changed, norm, replacement)
    return _preserved(model, changed, task, resources, seed)


def scale_inner_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Scale the inner channels of every block in one layer, and divide by the scale in the next."""
    return _scaled(model, task, resources, seed, "inner")


def scale_residual_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int
) -> AttackOutcome:
    """Scale residual channels: one factor for all layers that write a channel and all that read it."""
    return _scaled(model, task, resources, seed, "residual")


def _scaled(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, place: str
) -> AttackOutcome:
    gen = seeded_generator("mtlsign/attack/scale", SEED_LABELS[place], seed)
    changed = trainable_copy(model)
    for group in _channel_groups(changed):
        if group.place == place:
            factors = _positive(next(changed.parameters()), gen, group.size)
            channel_groups.scale_channels(changed, group, factors)
    return _preserved(model, changed, task, resources, seed)


def permute_channels(
    model: nn.Module, task: Task, resources: AttackerResources, seed: int, *, which: Which = "both"
) -> AttackOutcome:
    """Permute the inner channels of blocks, the residual channels, or both at random."""
    gen, changed = seeded_generator("mtlsign/attack/permute", seed), trainable_copy(model)
    for group in _channel_groups(changed):
        if which in ("both", group.place):
            order = torch.randperm(group.size, generator=gen).to(next(changed.parameters()).device)
            channel_groups.permute_channels(changed, group, order)
    return _preserved(model, changed, task, resources, seed)


def transpose_input(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Transpose every kernel; a user of the model transposes each image."""
    changed = trainable_copy(model)
    for m in changed.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.transpose(2, 3).contiguous()
    return _preserved(model, changed, task, resources, seed, ("transposed",))


def negate_input(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Negate the kernels of the first convolution; a user of the model negates each normalised image."""
    changed = trainable_copy(model)
    first = next((m for m in changed.modules() if isinstance(m, _ConvNd)), None)
    if first is None:
        raise NotApplicableError("The model has no convolution that reads the image.", field="model")
    with torch.no_grad():
        first.weight.neg_()
    return _preserved(model, changed, task, resources, seed, ("negated",))


@torch.no_grad()
def function_change(
    model: nn.Module, changed: nn.Module, x: Tensor, transforms: InputTransforms = ()
) -> float:
    """Return the largest difference of two models' outputs in float64.

    Args:
        model: the marked model.
        changed: the attacked model.
        x: images [n, C, H, W].
        transforms: applied to the images of the attacked model.

    Returns:
        The difference relative to the largest output, if that is above 1.
    """
    expected = copy.deepcopy(model).eval().double()(x.double())
    actual = copy.deepcopy(changed).eval().double()(transform_inputs(x.double(), transforms))
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1))


def _preserved(
    model: nn.Module,
    changed: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    transforms: InputTransforms = (),
) -> AttackOutcome:
    """Return the outcome if the changed model computes the function of the marked model."""
    x = attacker_sample(attacker_view(model, task, resources, seed), 8)
    try:
        difference = function_change(model, changed, x, transforms)
    except RuntimeError as error:  # the architecture needs images of another shape
        raise NotApplicableError(
            f"The model does not accept transformed inputs ({str(error)[:80]}).", field="model"
        ) from None
    if not difference <= TOLERANCE:
        raise NotApplicableError(
            f"The change is no symmetry of this architecture, because outputs differ by {difference:.1e}.",
            field="model",
        )
    return AttackOutcome(changed.eval(), input_transforms=transforms)


class _UnusedWeight(nn.Module):
    """Identity with a tensor that only the file contains."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _norms(model: nn.Module) -> list[Any]:
    """Return the batch norms that have both an affine map and running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if m.weight is not None and m.running_var is not None]
    if not norms:
        raise NotApplicableError(
            "The model has no batch norm with an affine map and running statistics.", field="model"
        )
    return norms


def _pairs(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> dict[str, str]:
    """Return the batch norm after each convolution, by module name."""
    pairs = batch_norm_of_conv(model, attacker_sample(attacker_view(model, task, resources, seed)))
    if not pairs:
        raise NotApplicableError("The model has no batch norm after a convolution.", field="model")
    return pairs


def _channel_groups(model: nn.Module) -> list[ChannelGroup]:
    try:
        return find_channel_groups(model)
    except ModelError as error:
        raise NotApplicableError(error.detail, field=error.field) from None


def _positive(like: Tensor, gen: Generator, size: int | None = None) -> Tensor:
    return torch.exp(0.7 * torch.randn(size or len(like), generator=gen)).to(like.device, like.dtype)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, new)
