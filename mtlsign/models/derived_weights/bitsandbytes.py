"""Kernels of 4 bits as bitsandbytes stores them: NF4 and FP4, with scales for blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights.companions import (
    INTEGERS,
    Companions,
    check_size,
    kernel_shape,
    misfit,
)

#: Most bytes of a state, and most brackets in it, which bounds the nesting.
MAX_STATE_BYTES, MAX_BRACKETS = 4096, 16
BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
#: Values of the 16 codes. NF4: QLoRA, arXiv 2305.14314, appendix E.
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * magnitude / 12 for sign in (1, -1) for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


def four_bits(companions: Companions, table: str) -> Tensor:
    """Return table[q] · absmax of the block. The values are flattened into blocks, high bits first.

    The file's own table is not read, as in the library.

    Args:
        companions: tensors of the layer.
        table: `nf4` or `fp4`.

    Raises:
        ModelError: a type or a shape does not fit, or the state is no valid JSON object.
    """
    state = _state(companions, table)
    sizes = state.get("shape")
    shape = kernel_shape(sizes if isinstance(sizes, list) else [])
    count = math.prod(shape)
    storage = companions.read("weight", (*FLOATS, *INTEGERS)).contiguous()
    data = storage.reshape(-1).view(torch.uint8)
    if not 0 <= 2 * data.numel() - count < 2 * storage.element_size():
        raise misfit("A packed kernel does not have its stated shape")
    check_size(2 * data.numel())
    codes = torch.stack((data >> 4, data & 15), dim=-1).reshape(-1)[:count]
    values = torch.tensor(TABLES[table], dtype=torch.float32).index_select(0, codes.int())
    return (values * _by_block(_block_maxima(companions, state), state.get("blocksize"), count)).reshape(
        shape
    )


def _block_maxima(companions: Companions, state: Mapping[str, Any]) -> Tensor:
    """Return the scale of each block, which may itself be stored as codes with scales."""
    nested = "weight.nested_absmax" in companions and "weight.nested_quant_map" in companions
    if not nested:
        return companions.numbers("weight.absmax").reshape(-1)
    codes = companions.read("weight.absmax", (torch.uint8,)).reshape(-1)
    table = companions.numbers("weight.nested_quant_map").reshape(-1)
    offset = state.get("nested_offset")
    if table.numel() != 256 or not isinstance(offset, int | float) or not abs(offset) <= 1e30:
        raise misfit("A packed kernel's scales are stored without a valid table")
    maxima = companions.numbers("weight.nested_absmax").reshape(-1)
    blocks = _by_block(maxima, state.get("nested_blocksize"), codes.numel())
    return table.index_select(0, codes.int()) * blocks + float(offset)


def _by_block(entries: Tensor, size: object, count: int) -> Tensor:
    """Return the entry of each value's block."""
    if not isinstance(size, int) or size not in BLOCK_SIZES or entries.numel() != -(-count // size):
        raise misfit("A packed kernel's scales do not fit its blocks")
    return entries.repeat_interleave(size)[:count]


def _state(companions: Companions, table: str) -> dict[str, Any]:
    stored = companions.read(f"weight.quant_state.bitsandbytes__{table}", (torch.uint8,))
    if stored.numel() > MAX_STATE_BYTES:
        raise misfit("A packed kernel has a state that is too long")
    content = bytes(stored.flatten().tolist())
    if content.count(b"[") + content.count(b"{") > MAX_BRACKETS:
        raise misfit("A packed kernel has a state with too many brackets")
    try:
        state = json.loads(content.decode("utf-8"), parse_constant=_raise_constant)
    except ValueError:
        raise misfit("A packed kernel has a state that is no JSON object") from None
    if not isinstance(state, dict):
        raise misfit("A packed kernel has a state that is no JSON object")
    return state


def _raise_constant(_: str) -> NoReturn:
    raise ValueError
