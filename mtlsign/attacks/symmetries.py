"""Changes of batch norms and of the scales of kernels that preserve the function."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, NotApplicableError
from mtlsign.attacks.equal_function import positive_factors, preserved_outcome
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


def bn_reparameterize(model: nn.Module, task: Task, resources: AttackerResources, seed: int) -> AttackOutcome:
    """Reparametrise batch norms: (gamma, var) -> (a gamma, a^2 var), (mean, beta) -> (mean + t, beta + c).

    a > 0 and t are random; c = gamma t / sqrt(var).
    """
    gen, changed = seeded_generator("mtlsign/attack/gauge", seed), trainable_copy(model)
    with torch.no_grad():
        for m in _norms(changed):
            var = m.running_var + m.eps
            # a smaller a would need a negative variance
            a = torch.maximum(positive_factors(m.weight, gen), (m.eps / var).sqrt())
            t = torch.randn(len(var), generator=gen).to(var)
            m.bias.add_(m.weight * t / var.sqrt())
            m.running_mean.add_(t)
            m.weight.mul_(a)
            m.running_var.copy_((a**2 * var - m.eps).clamp(min=0))
    return preserved_outcome(model, changed, task, resources, seed)


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
            size = torch.maximum(positive_factors(m.weight, gen), (m.eps / var).sqrt())
            sign = (torch.randint(2, (len(var),), generator=gen) * 2 - 1).to(var)
            layer.weight.mul_((size * sign).reshape(-1, *([1] * (layer.weight.dim() - 1))))
            if layer.bias is not None:
                layer.bias.mul_(size * sign)
            m.running_mean.mul_(size * sign)
            m.running_var.copy_((size**2 * var - m.eps).clamp(min=0))
            m.weight.mul_(sign)
    return preserved_outcome(model, changed, task, resources, seed)


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
    return preserved_outcome(model, changed, task, resources, seed)


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


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner) if owner else model, leaf, new)
