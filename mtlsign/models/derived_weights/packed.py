"""Kernels with several values in one byte or word: compressed-tensors, quanto and torchao."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights.companions import (
    FLOAT8S,
    INTEGERS,
    MAX_DIMENSIONS,
    Companions,
    as_float32,
    check_size,
    kernel_shape,
    misfit,
)
from mtlsign.models.derived_weights.scaled import expanded, per_channel, scaled

_WORD = 32


def compressed(companions: Companions) -> Tensor:
    """Return (q − z) · scale for integers of 4 or 8 bits that are packed into words of 32 bits.

    Raises:
        ModelError: a type or a shape does not fit.
    """
    packed = companions.read("weight_packed", (torch.int32,))
    stated = companions.read("weight_shape", INTEGERS)
    if stated.numel() > MAX_DIMENSIONS:
        raise misfit("A stored kernel states no valid shape")
    shape = kernel_shape(stated.flatten().tolist())
    widths = [bits for bits in (4, 8) if packed.shape == (*shape[:-1], -(-shape[-1] * bits // _WORD))]
    if not widths or len(shape) < 2:
        raise misfit("A packed kernel does not have its stated shape")
    values = _signed_fields(packed, widths[0], shape[-1])
    scale = companions.numbers("weight_scale", (*FLOATS, *FLOAT8S))
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    if "weight_zero_point" in companions:
        zeros = _zero_points(companions, widths[0], shape[0])
        values -= _ordered(companions, zeros, shape)
    return values.mul_(_ordered(companions, scale, shape))


def _zero_points(companions: Companions, bits: int, rows: int) -> Tensor:
    """Return the zero points; words of 32 bits hold those of several rows."""
    zeros = companions.read("weight_zero_point", (torch.int8, torch.int32))
    if zeros.dtype == torch.int8:
        return zeros.float()
    if zeros.ndim != 2 or zeros.shape[0] != -(-rows * bits // _WORD):
        raise misfit("A packed kernel's zero points do not fit its shape")
    return _signed_fields(zeros.T, bits, rows).T


def _ordered(companions: Companions, entries: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the scale or zero point of each value, by the group index of each column if the file has one."""
    if "weight_g_idx" not in companions or entries.ndim != 2 or len(shape) != 2:
        return expanded(entries, shape)
    index = companions.read("weight_g_idx", INTEGERS).flatten().long()
    if bool((index == -1).any()):  # not initialised
        return expanded(entries, shape)
    if (
        entries.shape[0] not in (1, shape[0])
        or index.shape != shape[1:]
        or int(index.min()) < 0
        or int(index.max()) >= entries.shape[1]
    ):
        raise misfit("A packed kernel's group index does not fit its shape")
    return expanded(entries[:, index], shape)


def _signed_fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first fields of each row of words, lowest bits first, less half their range."""
    check_size(words.numel() * _WORD // bits)
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    fields = (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1)
    return fields.flatten(-2)[..., :count].float().sub_(1 << (bits - 1))


def quanto_packed(companions: Companions) -> Tensor:
    """Return q · scale − shift, or (q − shift) · scale for an integer shift.

    The rows of q are 2 or 4 consecutive parts of the fields of each byte. With groups, a row is a group; the
    file does not state the shape of the kernel, and the result has one row for each group.

    Raises:
        ModelError: a type or a shape does not fit.
    """
    data = companions.read("weight._data._data", (torch.uint8,))
    scale = companions.numbers("weight._scale")
    shift = companions.read("weight._shift", (*FLOATS, torch.int8, torch.uint8))
    rows = scale.shape[0] if scale.ndim else 0
    parts = next((n for n in (2, 4) if data.ndim > 1 and data.shape[0] == -(-rows // n)), 0)
    if not parts or scale.shape != (rows, *[1] * (data.ndim - 1)) or shift.shape != scale.shape:
        raise misfit("A packed kernel's scales do not fit its shape")
    check_size(data.numel() * parts)
    bits = 8 // parts
    fields = torch.cat([(data >> (bits * part)) & ((1 << bits) - 1) for part in range(parts)])
    values = fields[:rows].float()
    offset = as_float32(shift)
    return values * scale - offset if shift.is_floating_point() else (values - offset) * scale


def torchao(companions: Companions) -> Tensor:
    """Return (q − z) · scale, or q · scale + z for 4-bit q; input channels are scaled if the file states it.

    Raises:
        ModelError: a type or a shape does not fit.
    """
    zero_point = "_weight_zero_point"
    floating = (
        zero_point in companions and companions.read(zero_point, (*FLOATS, *INTEGERS)).is_floating_point()
    )
    if floating:
        kernel = _torchao_four_bits(companions)
    else:
        kernel = scaled(companions, "_weight_qdata", "_weight_scale", zero_point)
    if "_weight_act_pre_scale" in companions:
        kernel = per_channel(kernel, companions.numbers("_weight_act_pre_scale"))
    return kernel


def _torchao_four_bits(companions: Companions) -> Tensor:
    """Return q · scale + z; each byte holds two columns, and scales and z are transposed."""
    data = companions.read("_weight_qdata", (torch.int8, torch.uint8))
    scale, zeros = companions.numbers("_weight_scale"), companions.numbers("_weight_zero_point")
    if data.ndim != 2 or scale.ndim != 2 or zeros.shape != scale.shape or scale.shape[1] != data.shape[0]:
        raise misfit("A packed kernel's scales do not fit its shape")
    check_size(data.numel() * 2)
    low, high = data & 15, (data >> 4) & 15
    fields = torch.stack((low, high), dim=-1).flatten(1).to(torch.int8)
    values = torch.where(fields > 7, fields - 16, fields).float()
    shape = tuple(values.shape)
    return values * expanded(scale.T, shape) + expanded(zeros.T, shape)
