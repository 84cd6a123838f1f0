"""Kernels of 8 bits with scales: for the tensor, for each row, or for blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights.companions import (
    CODES,
    FLOAT8S,
    INTEGERS,
    Companions,
    as_float32,
    check_size,
    misfit,
)

#: Length of a block that does not have to divide the kernel's dimension.
BLOCK = 128
#: The unit of bitsandbytes' row scales is the largest magnitude of a row.
INT8_UNIT = 127


def scaled(companions: Companions, kernel: str, scale: str, zero_point: str | None = None) -> Tensor:
    """Return (q − z) · scale, or q alone if the kernel is stored as plain floats.

    Args:
        companions: tensors of the layer.
        kernel: suffix of q.
        scale: suffix of the scales, see `expanded`.
        zero_point: suffix of z, which has the shape of the scales and may be absent.

    Raises:
        ModelError: a type or a shape does not fit.
    """
    stored = companions.read(kernel, (*FLOATS, *CODES))
    values = as_float32(stored)
    if stored.dtype in FLOATS:
        return values
    shape = tuple(values.shape)
    if zero_point is not None and zero_point in companions:
        values.sub_(expanded(companions.numbers(zero_point, (*INTEGERS, *FLOATS, *FLOAT8S)), shape))
    return values.mul_(expanded(companions.numbers(scale, (*FLOATS, *FLOAT8S)), shape))


def scaled_rows(companions: Companions) -> Tensor:
    """Return q · SCB / 127, the form of bitsandbytes. Raises `ModelError` if q is not stored row by row."""
    if "weight_format" in companions:
        layout = companions.read("weight_format", INTEGERS)
        if layout.numel() != 1 or int(layout) != 0:
            raise misfit("A kernel of 8 bits is not stored row by row")
    return scaled(companions, "weight", "SCB") / INT8_UNIT


def expanded(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the scale of each value, as a tensor that broadcasts to the shape of the kernel.

    One entry is for the whole kernel. One dimension, or a second one of length 1, is for rows. Otherwise the
    scale has the kernel's dimensions, and its n entries along one of length L are for blocks of 128 if
    n = ⌈L/128⌉, else of L/n.

    Args:
        scale: scales or zero points.
        shape: shape of the kernel.

    Raises:
        ModelError: the shapes do not fit.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 or (scale.ndim == 2 and scale.shape[1] == 1):
        scale = scale.reshape([-1] + [1] * (len(shape) - 1))
    if scale.ndim != len(shape) or any(n > length for n, length in zip(scale.shape, shape, strict=True)):
        raise misfit("A stored kernel's scales do not fit its shape")
    for dimension, (n, length) in enumerate(zip(tuple(scale.shape), shape, strict=True)):
        if n not in (1, length):
            block = _block_length(n, length)
            scale = scale.repeat_interleave(block, dimension).narrow(dimension, 0, length)
    return scale


def _block_length(n: int, length: int) -> int:
    if n == -(-length // BLOCK):
        return BLOCK
    if length % n:
        raise misfit("A stored kernel's scales do not fit its shape")
    return length // n


def per_channel(kernel: Tensor, scale: Tensor) -> Tensor:
    """Multiply each input channel of a two-dimensional kernel. Raises `ModelError` if the shapes differ."""
    if scale.numel() != 1 and (kernel.ndim != 2 or scale.numel() != kernel.shape[1]):
        raise misfit("A stored kernel's input scales do not fit its shape")
    return kernel * scale.reshape(-1)


def as_numbers(tensor: Tensor) -> Tensor:
    """Return an int8 or float8 tensor as float32, and any other tensor unchanged.

    Raises `ModelError` if it has too many values.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int8, *FLOAT8S):
        return tensor
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return tensor
    check_size(tensor.numel())
    return tensor.detach().to("cpu", torch.float32)
