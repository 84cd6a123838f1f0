"""Changes that leave the network's function exactly alone: what a thief may do for nothing.

`facts/attacks.md` §§D, F.6 and F.7. Each result is compared with the stolen model on a few of the attacker's
images in float64 before it counts.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mtlsign.attacks.attacker_data import attacker_view, transform_inputs
from mtlsign.attacks.base import AttackerResources, AttackOutcome, Inputs, NotApplicableError
from mtlsign.attacks.training import trainable_copy
from mtlsign.errors import ModelError
from mtlsign.models import channel_groups
from mtlsign.models.channel_groups import ChannelGroup, batch_norm_of_conv, find_channel_groups
from mtlsign.tasks import Task
from mtlsign.tasks.base import seeded_generator

#: Largest difference of outputs, relative to the largest output where that is above 1.
TOLERANCE = 1e-5

Which = Literal["inner", "stream", "both"]


def bn_reparameterize(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """(γ, σ²) → (aγ, a²σ²), (μ, β) → (μ + t, β + γt/σ) with random a > 0 and t, in every batch norm."""
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
    return _preserved(model, changed, task, budget, seed)


def scale_filters(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """Convolution rows times s of either sign before their batch norm, which undoes it (γ takes the sign)."""
    gen, changed = seeded_generator("mtlsign/attack/rows", seed), trainable_copy(model)
    modules = dict(changed.named_modules())
    with torch.no_grad():
        for conv, norm in _pairs(changed, task, budget, seed).items():
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
    return _preserved(model, changed, task, budget, seed)


def bn_fold(
    model: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    *,
    decoys: Literal["none", "signs"] = "none",
) -> AttackOutcome:
    """Batch norms folded into their convolutions, which get biases; no batch norm is left.

    With `decoys=signs` an unused γ of random sign stays in the file under its old name.
    """
    changed = trainable_copy(model)
    gen = seeded_generator("mtlsign/attack/decoys", seed)
    for conv, norm in _pairs(changed, task, budget, seed).items():
        layer, m = changed.get_submodule(conv), changed.get_submodule(norm)
        plain = type(m) is nn.BatchNorm2d
        rest = [part for part in (getattr(m, "drop", None), getattr(m, "act", None)) if part is not None]
        if not isinstance(layer, nn.Conv2d) or not isinstance(m, nn.BatchNorm2d) or not (plain or rest):
            raise NotApplicableError(
                f"{norm!r} is a {type(m).__name__}, which does more than normalise; nothing is folded",
                field="model",
            )
        left: nn.Module = nn.Identity() if plain else nn.Sequential(*rest)  # timm's norms hold activations
        if decoys == "signs" and plain:
            signs = (torch.randint(2, (m.num_features,), generator=gen) * 2 - 1).to(m.weight)
            left = _Unused(signs * m.weight.detach().abs())
        _replace(changed, conv, fuse_conv_bn_eval(layer, m))
        _replace(changed, norm, left)
    return _preserved(model, changed, task, budget, seed)


def scale_inner_channels(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """Inner channels of every block scaled up in one layer and down in the next."""
    return _scaled(model, task, budget, seed, "inner")


def scale_residual_channels(
    model: nn.Module, task: Task, budget: AttackerResources, seed: int
) -> AttackOutcome:
    """The residual streams scaled: one factor per channel for all that write it and all that read it."""
    return _scaled(model, task, budget, seed, "stream")


def _scaled(model: nn.Module, task: Task, budget: AttackerResources, seed: int, place: str) -> AttackOutcome:
    gen, changed = seeded_generator("mtlsign/attack/scale", place, seed), trainable_copy(model)
    for channels in _channel_sets(changed):
        if channels.place == place:
            channel_groups.scale_channels(
                changed, channels, _positive(next(changed.parameters()), gen, channels.size)
            )
    return _preserved(model, changed, task, budget, seed)


def permute_channels(
    model: nn.Module, task: Task, budget: AttackerResources, seed: int, *, which: Which = "both"
) -> AttackOutcome:
    """Channels of the blocks' inner layers, of the residual streams, or both, in a random order."""
    gen, changed = seeded_generator("mtlsign/attack/permute", seed), trainable_copy(model)
    for channels in _channel_sets(changed):
        if which in ("both", channels.place):
            order = torch.randperm(channels.size, generator=gen).to(next(changed.parameters()).device)
            channel_groups.permute_channels(changed, channels, order)
    return _preserved(model, changed, task, budget, seed)


def transpose_input(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """Every kernel transposed; its user transposes each image first."""
    changed = trainable_copy(model)
    for m in changed.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.transpose(2, 3).contiguous()
    return _preserved(model, changed, task, budget, seed, ("transposed",))


def negate_input(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> AttackOutcome:
    """The first convolution's kernels negated; its user negates each (normalised) image first."""
    changed = trainable_copy(model)
    first = next((m for m in changed.modules() if isinstance(m, _ConvNd)), None)
    if first is None:
        raise NotApplicableError("has no convolution that reads the image", field="model")
    with torch.no_grad():
        first.weight.neg_()
    return _preserved(model, changed, task, budget, seed, ("negated",))


@torch.no_grad()
def function_change(model: nn.Module, changed: nn.Module, x: Tensor, inputs: Inputs = ()) -> float:
    """Largest difference of the outputs on x [n, C, H, W] in float64, relative to the largest if above 1."""
    want = copy.deepcopy(model).eval().double()(x.double())
    got = copy.deepcopy(changed).eval().double()(transform_inputs(x.double(), inputs))
    return float((want - got).abs().max() / want.abs().max().clamp(min=1))


def _preserved(
    model: nn.Module,
    changed: nn.Module,
    task: Task,
    budget: AttackerResources,
    seed: int,
    inputs: Inputs = (),
) -> AttackOutcome:
    data = attacker_view(model, task, budget, seed)
    x, _ = data.splits["attacker"].batch(torch.arange(min(8, data.size("attacker"))))
    try:
        off = function_change(model, changed, x, inputs)
    except RuntimeError as error:  # an architecture that wants another shape
        raise NotApplicableError(f"does not take such inputs ({str(error)[:80]})", field="model") from None
    if not off <= TOLERANCE:
        raise NotApplicableError(
            f"changes the function of this architecture (outputs move by {off:.1e}); it is no symmetry of it",
            field="model",
        )
    return AttackOutcome(changed.eval(), inputs=inputs)


class _Unused(nn.Module):
    """Does nothing; its tensor only lies in the file."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _norms(model: nn.Module) -> list[Any]:
    """Batch norms that have both an affine and running statistics."""
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    found = [m for m in found if m.weight is not None and m.running_var is not None]
    if not found:
        raise NotApplicableError("has no batch norm with an affine and running statistics", field="model")
    return found


def _pairs(model: nn.Module, task: Task, budget: AttackerResources, seed: int) -> dict[str, str]:
    """Convolution -> the batch norm behind it."""
    found = batch_norm_of_conv(
        model, attacker_view(model, task, budget, seed).splits["attacker"].batch(torch.arange(1))[0]
    )
    if not found:
        raise NotApplicableError("has no batch norm behind a convolution", field="model")
    return found


def _channel_sets(model: nn.Module) -> list[ChannelGroup]:
    try:
        return find_channel_groups(model)
    except ModelError as error:
        raise NotApplicableError(error.detail, field=error.field) from None


def _positive(like: Tensor, gen: Generator, size: int | None = None) -> Tensor:
    return torch.exp(0.7 * torch.randn(size or len(like), generator=gen)).to(like.device, like.dtype)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, new)
