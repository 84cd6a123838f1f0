"""Activation checkpointing: activations of repeated blocks are computed again in the backward pass.

Autograd then keeps the inputs of each block and the activations of one block at a time. Outputs and gradients
are the same, bit for bit; each step computes the blocks once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def repeated_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a network by name: the outermost elements of its sequences that have children.

    They are the residual blocks of a ResNet and the blocks of a transformer. A network that is a flat
    sequence of layers has none.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        if any(name.startswith(f"{block}.") for block in blocks):
            continue
        for child_name, child in module.named_children():
            is_sequence = isinstance(child, nn.Sequential | nn.ModuleList)
            if any(True for _ in child.children()) and not is_sequence:
                blocks[f"{name}.{child_name}" if name else child_name] = child
    return blocks


@contextmanager
def checkpointed(network: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Checkpoint the activations of all blocks of a network while the context is open.

    Copies of the network that are made inside have the same property. Running statistics of normalisations
    are updated once, by the first pass.

    Args:
        network: unchanged after the context.
        enabled: if False, nothing is done.
    """
    blocks = list(repeated_blocks(network).values()) if enabled else []
    for block in blocks:
        block.forward = _CheckpointedForward(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _CheckpointedForward:
    """Forward function of a block that computes its activations again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        if not torch.is_grad_enabled():
            return type(block).forward(block, *args, **kwargs)
        return checkpoint(
            type(block).forward, block, *args, use_reentrant=False, context_fn=self._contexts, **kwargs
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of the first pass and of the repeated one."""
        return nullcontext(), _fixed_statistics(self._block)


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics as they are; normalisations use those of the batch as before."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)
