"""Batch norms of a network, including frozen ones whose values are buffers.

Detectors and segmentation networks often have a frozen batch norm: a module that is no class of torch and
whose weight, bias and statistics are four buffers, such as `torchvision.ops.FrozenBatchNorm2d`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_FROZEN_BUFFERS = frozenset(("weight", "bias", "running_mean", "running_var"))
_COUNTER = "num_batches_tracked"
#: Value in the frozen batch norms that do not store one.
_DEFAULT_EPS = 1e-5


class BatchNormValues(NamedTuple):
    """Values of a batch norm: γ and β float32 [channels] on the CPU, and ε."""

    gamma: Tensor
    beta: Tensor
    eps: float


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Return whether the module is a batch norm whose weight, bias and statistics are buffers."""
    if isinstance(module, _BatchNorm) or next(module.parameters(recurse=False), None) is not None:
        return False
    buffers = dict(module.named_buffers(recurse=False))
    return (
        set(buffers) - {_COUNTER} == _FROZEN_BUFFERS
        and len({tuple(buffers[name].shape) for name in _FROZEN_BUFFERS}) == 1
        and buffers["weight"].dim() == 1
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether the module is a batch norm of torch, a class derived from one, or a frozen one."""
    return isinstance(module, _BatchNorm) or is_frozen_batch_norm(module)


def batch_norm_values(module: nn.Module) -> BatchNormValues:
    """Return the values of a batch norm; γ is 1 and β is 0 where it has none.

    Args:
        module: a module for which `is_batch_norm` is true.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor):
        size = len(weight)
    else:
        assert isinstance(module, _BatchNorm)
        size = module.num_features
    gamma = weight if isinstance(weight, Tensor) else torch.ones(size)
    beta = bias if isinstance(bias, Tensor) else torch.zeros(size)
    eps = getattr(module, "eps", _DEFAULT_EPS)
    return BatchNormValues(_plain(gamma), _plain(beta), float(eps))


def replace_frozen_batch_norms(model: nn.Module) -> None:
    """Replace each frozen batch norm by `nn.BatchNorm2d` with the same values and tensor names, in place.

    The weights and biases become parameters, and a training mode with batch statistics becomes possible.
    """
    for name, module in list(model.named_modules()):
        if not name or not is_frozen_batch_norm(module):
            continue
        buffers = dict(module.named_buffers(recurse=False))
        values = batch_norm_values(module)
        replacement = nn.BatchNorm2d(len(values.gamma), eps=values.eps).to(buffers["weight"].device)
        with torch.no_grad():
            for leaf in sorted(_FROZEN_BUFFERS):
                getattr(replacement, leaf).copy_(buffers[leaf])
        if _COUNTER not in buffers:
            replacement.num_batches_tracked = None
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, replacement.train(module.training))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
