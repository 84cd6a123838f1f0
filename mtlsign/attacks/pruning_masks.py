"""Pruning operations in place: the smallest weights, or the least important channels and units, become 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.attacks.attacker_data import attacker_sample
from mtlsign.attacks.base import NotApplicableError, device_of
from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.models.channel_groups import batch_norm_of_conv
from mtlsign.models.recurrent_layers import gate_count, is_recurrent, step_inputs
from mtlsign.tasks import Task

Rule = Literal["activity", "norm"]

#: Batches over which activity is measured, and their size.
ACTIVITY_BATCHES, ACTIVITY_BATCH = 8, 256


@torch.no_grad()
def prune_weights(model: nn.Module, ratio: float) -> None:
    """Set the smallest `ratio` of each weight tensor of two or more dimensions to 0."""
    for p in model.parameters():
        if p.dim() > 1:
            threshold = torch.kthvalue(p.abs().flatten(), max(1, int(ratio * p.numel()))).values
            p.mul_(p.abs() > threshold)


@torch.no_grad()
def prune_units(model: nn.Module, data: Task, ratio: float, by: Rule) -> None:
    """Set the least important channels of each convolution and units of each recurrent layer to 0.

    Gamma and beta of a convolution's batch norm become 0 as well, and all gates and biases of a unit, whose
    output then is 0.

    Args:
        model: changed in place.
        data: the attacker's view of the task.
        ratio: fraction of the channels, and of the units of each direction of a layer.
        by: "norm" of the kernel rows (of a unit: of all gates), or mean "activity" of the batch norm (else of
            the convolution, or of the unit's output) on the attacker's inputs.

    Raises:
        NotApplicableError: the model has neither convolutions nor recurrent layers.
    """
    modules = dict(model.named_modules())
    convolutions = {n: m for n, m in modules.items() if isinstance(m, _ConvNd)}
    directions = {
        f"{name}.{leaf}": (module, leaf)
        for name, module in modules.items()
        if is_recurrent(module)
        for leaf, _ in module.named_parameters()
        if leaf.startswith("weight_hh_")
    }
    if not convolutions and not directions:
        raise NotApplicableError(
            "The model has no convolution and no recurrent layer. Prune weights instead (prune).",
            field="model",
        )
    norms = batch_norm_of_conv(model, attacker_sample(data)) if convolutions else {}
    importance = {n: m.weight.flatten(1).norm(dim=1) for n, m in convolutions.items()}
    importance |= {n: _unit_norms(module, leaf) for n, (module, leaf) in directions.items()}
    if by == "activity":
        importance = _activity(model, data, {norms.get(n, n): n for n in convolutions})
    for name, conv in convolutions.items():
        if name not in importance:  # never called, such as those of a discriminator
            continue
        parts = [conv.weight, conv.bias]
        if name in norms:
            norm = modules[norms[name]]
            parts += [norm.weight, norm.bias]
        for part in parts:
            if part is not None:
                part[_least(importance[name], ratio)] = 0.0
    for name, (module, leaf) in directions.items():
        least = _least(importance[name], ratio)
        for part in _unit_parameters(module, leaf):
            part.view(gate_count(module), len(importance[name]), -1)[:, least] = 0.0


def _least(importance: Tensor, ratio: float) -> Tensor:
    """Return the numbers of the least important channels, a fraction `ratio` of all."""
    return torch.argsort(importance, stable=True)[: int(ratio * len(importance))]


def _unit_parameters(module: nn.Module, leaf: str) -> list[Tensor]:
    """Return matrices and biases of one direction of a recurrent layer; `leaf` is its `weight_hh`."""
    suffix = leaf.removeprefix("weight_hh_")
    names = (f"{part}_{suffix}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    parameters = dict(module.named_parameters(recurse=False))
    return [parameters[name] for name in names if name in parameters]


def _unit_norms(module: nn.Module, leaf: str) -> Tensor:
    """Return the norm of the rows of all gates of each unit, [hidden]."""
    gates = gate_count(module)
    rows = [p for p in _unit_parameters(module, leaf) if p.dim() > 1]
    of_units = [p.reshape(gates, len(p) // gates, -1).transpose(0, 1).flatten(1) for p in rows]
    norms: Tensor = torch.cat(of_units, 1).norm(dim=1)
    return norms


def _activity(model: nn.Module, data: Task, conv_of_module: dict[str, str]) -> dict[str, Tensor]:
    """Return the mean activity of each channel by convolution, and of each unit by its `weight_hh`."""
    sums: dict[str, Tensor] = {}

    def add(name: str, mean: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros_like(mean)) + mean

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add_channels(module: nn.Module, args: object, out: Tensor) -> None:
            # a ReLU after a batch norm removes negative values, so they are no activity
            active = out.clamp(min=0) if is_batch_norm(module) else out.abs()
            add(name, active.detach().mean([d for d in range(out.dim()) if d != 1]))

        return add_channels

    def unit_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def add_units(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
            assert isinstance(module, nn.LSTM | nn.GRU)
            for leaf, vectors in step_inputs(module, args[0]).items():
                if leaf.startswith("weight_hh_"):
                    add(f"{name}.{leaf}", vectors.abs().mean(0))

        return add_units

    named = dict(model.named_modules())
    handles = [named[n].register_forward_hook(hook(conv)) for n, conv in conv_of_module.items()]
    handles += [m.register_forward_hook(unit_hook(n)) for n, m in named.items() if is_recurrent(m)]
    try:
        model.eval()
        for i, (x, _) in enumerate(data.batches("attacker", ACTIVITY_BATCH, shuffle=False)):
            if i == ACTIVITY_BATCHES:
                break
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@torch.no_grad()
def accuracy(model: nn.Module, data: Task) -> float:
    """Return the task's metric on the attacker's images without augmentation.

    The value is rounded to float32, so that comparisons with a threshold do not depend on float64 digits.
    """
    model.eval()
    metric = data.metric(device_of(model))
    for batch in data.batches("attacker", 500, shuffle=False):
        metric.update(data.predictions(model, batch), batch.targets)
    return float(torch.tensor(metric.value(), dtype=torch.float32))
