"""Blocks without effect in residual networks of convolutions, such as ResNets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks.base import NotApplicableError


@torch.no_grad()
def insert_residual_blocks(model: nn.Module, images: Tensor, generator: Generator) -> None:
    """Insert a block into every stage before the first one that keeps the shape of its inputs, in place.

    A stage is an `nn.Sequential` of blocks with convolutions. The new block has random weights, and its last
    layer with parameters that can silence it is zero, so that its shortcut alone is left. Later blocks of the
    stage get other numbers.

    Args:
        model: the network.
        images: float [n, C, H, W], on which the blocks are tried.
        generator: source of the weights.

    Raises:
        NotApplicableError: no stage has a block of which a copy can be silenced.
    """
    inputs = _inputs_of_blocks(model, images)
    count = 0
    for stage in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for place, block in enumerate(stage):
            x = inputs.get(block)
            dummy = None if x is None else _silent_copy(block, x, generator)
            if dummy is not None:
                _insert(stage, place, dummy)
                count += 1
                break
    if not count:
        raise NotApplicableError(
            "The network has no residual block of convolutions whose inputs and outputs have one shape.",
            field="model",
        )


def _insert(stage: nn.Sequential, place: int, block: nn.Module) -> None:
    """Insert a block; later ones get other numbers, unless the members have names."""
    if all(name.isdecimal() for name, _ in stage.named_children()):
        stage.insert(place, block)
        return
    members = list(stage.named_children())
    for name, _ in members:
        delattr(stage, name)
    for name, member in (*members[:place], ("inserted", block), *members[place:]):
        stage.add_module(name, member)


def _inputs_of_blocks(model: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """Return the inputs of the blocks of every `nn.Sequential` whose outputs have their inputs' shape."""
    inputs: dict[nn.Module, Tensor] = {}

    def remember(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        x = arguments[0] if len(arguments) == 1 else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape:
            inputs.setdefault(block, x)

    handles = [block.register_forward_hook(remember) for block in _blocks(model)]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of every `nn.Sequential` that have at least two convolutions."""
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential):
            for block in sequence:
                if sum(isinstance(module, nn.Conv2d) for module in block.modules()) > 1:
                    yield block


def _silent_copy(block: nn.Module, x: Tensor, generator: Generator) -> nn.Module | None:
    """Return a copy with random weights that returns its inputs; None if no layer silences it.

    Args:
        block: the block.
        x: inputs, [n, C, H, W].
        generator: source of the weights.
    """
    random = copy.deepcopy(block)
    for parameter in random.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(parameter.std() * noise)
    layers = [name for name, module in random.named_modules() if list(module.parameters(recurse=False))]
    for name in reversed(layers):
        trial = copy.deepcopy(random)
        for parameter in trial.get_submodule(name).parameters():
            parameter.zero_()
        if torch.equal(trial(x), x):
            return trial
    return None
