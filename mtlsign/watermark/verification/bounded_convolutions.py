"""Convolutions in binary64 whose working memory is bounded.

PyTorch computes them as one matrix product for each sample, and holds the matrices of all samples at once:
for a 7x7 kernel 49 times the size of the input. In parts of the batch, the outputs are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

#: Numbers of the matrices of all samples of a part: 64 MiB.
MAX_MATRIX_NUMBERS = 2**23


def bound_convolutions(network: nn.Module) -> None:
    """Let the convolutions of a network process a batch in parts if the whole needs too much memory."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module._conv_forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(conv: nn.Conv2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of [N, C, H, W] without gradients in parts, otherwise as a whole."""
    convolve: Callable[..., Tensor] = partial(nn.Conv2d._conv_forward, conv)
    if inputs.dtype != torch.float64 or inputs.dim() != 4 or torch.is_grad_enabled():
        return convolve(inputs, weight, bias)
    positions = inputs.shape[2] * inputs.shape[3] / math.prod(conv.stride)
    numbers = positions * weight[0].numel() * conv.groups
    size = max(1, int(MAX_MATRIX_NUMBERS / max(1.0, numbers)))
    if size >= len(inputs):
        return convolve(inputs, weight, bias)
    return torch.cat([convolve(part, weight, bias) for part in inputs.split(size)])
