"""Pruning by weights and activations (Wanda, Sun et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.adapter_tuning import inner_linear_layers
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.attacks.base import AttackerResources, AttackOutcome, Fraction
from mtlsign.attacks.training import trainable_copy
from mtlsign.models.input_spec import TextSpec
from mtlsign.tasks import Task

Samples = Annotated[int, Field(ge=1, le=100_000)]
_BATCH = 16


def prune_activations(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    ratio: Fraction = 0.5,
    samples: Samples = 128,
) -> AttackOutcome:
    """Set the smallest `ratio` of |W|·‖x‖ in every row of every linear layer but the last to 0.

    ‖x‖ is the Euclidean norm of each input number of the layer over the tokens of `samples` inputs. All
    norms are those of the stolen network; nothing is trained.

    Raises:
        NotApplicableError: the network has no linear layers before its outputs.
    """
    pruned = trainable_copy(model)
    layers = inner_linear_layers(pruned)
    norms = _input_norms(pruned, layers, attacker_view(model, task, resources, seed), samples)
    with torch.no_grad():
        for name, layer in layers.items():
            if name not in norms:  # a layer that no input reaches
                continue
            importance = layer.weight.abs() * norms[name].to(layer.weight)
            least = importance.argsort(dim=1, stable=True)[:, : int(ratio * importance.shape[1])]
            layer.weight.scatter_(1, least, 0.0)
    return AttackOutcome(pruned)


@torch.no_grad()
def _input_norms(
    model: nn.Module, layers: Mapping[str, nn.Linear], data: Task, samples: int
) -> dict[str, Tensor]:
    """Return the norm of each input number of each layer, float64 [in]; padding tokens do not count."""
    squares: dict[str, Tensor] = {}
    tokens: Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0].detach().double()
            if tokens is not None and x.shape[:-1] == tokens.shape:
                x = x[tokens]
            total = x.reshape(-1, x.shape[-1]).square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    count = min(samples, data.size("attacker"))
    try:
        for start in range(0, count, _BATCH):
            rows = torch.arange(start, min(start + _BATCH, count))
            inputs = data.splits["attacker"].batch(rows).inputs
            tokens = inputs != 0 if isinstance(data.input_spec, TextSpec) else None
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}
