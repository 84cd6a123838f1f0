"""Small files of tensors, with reference formulas that are written without the package."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

#: The values of NF4 and FP4 as the papers and libraries list them.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
FP4 = [
    0,
    1 / 192,
    2 / 3,
    1,
    1 / 3,
    1 / 2,
    1 / 6,
    1 / 4,
    0,
    -1 / 192,
    -2 / 3,
    -1,
    -1 / 3,
    -1 / 2,
    -1 / 6,
    -1 / 4,
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Return integers from low to high, both included, as int64."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def words(fields: list[int], bits: int) -> list[int]:
    """Return the words of 32 bits, signed, that hold the fields with the lowest bits first."""
    per_word = 32 // bits
    packed = []
    for start in range(0, len(fields), per_word):
        word = sum(field << (bits * i) for i, field in enumerate(fields[start : start + per_word]))
        packed.append(word - 2**32 if word >= 2**31 else word)
    return packed


def packed_rows(values: Tensor, bits: int) -> Tensor:
    """Return the rows of signed integers packed into int32."""
    offset = 2 ** (bits - 1)
    return torch.tensor(
        [words([v + offset for v in row], bits) for row in values.tolist()], dtype=torch.int32
    )


def state(**fields: Any) -> Tensor:
    """Return a JSON object as a tensor of bytes."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def nf4_file(*, kind: str = "nf4", nested: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a layer of 3 × 25 values in 4 bits, and its kernel."""
    indices = codes(0, 15, 75).tolist()
    table = NF4 if kind == "nf4" else FP4
    data = [16 * high + low for high, low in zip(indices[::2], [*indices[1::2], 0], strict=True)]
    fields: dict[str, Any] = {"quant_type": kind, "blocksize": 32, "dtype": "float32", "shape": [3, 25]}
    file = {
        "l.weight": torch.tensor(data, dtype=torch.uint8).reshape(-1, 1),
        "l.weight.quant_map": numbers(16),  # not read
    }
    if nested:
        maxima = [0.5 * (i / 255) + 0.25 for i in (7, 255, 3)]
        file["l.weight.absmax"] = torch.tensor([7, 255, 3], dtype=torch.uint8)
        file["l.weight.nested_absmax"] = torch.tensor([0.5])
        file["l.weight.nested_quant_map"] = torch.arange(256) / 255
        fields |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
    else:
        maxima = [0.5, 2.0, 3.0]
        file["l.weight.absmax"] = torch.tensor(maxima)
    file[f"l.weight.quant_state.bitsandbytes__{kind}"] = state(**fields)
    kernel = torch.tensor([table[index] * maxima[i // 32] for i, index in enumerate(indices)])
    return file, kernel.reshape(3, 25)


def packed_file(bits: int, *, zero_points: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a packed layer of 5 × 24 values in 3 groups for each row, and its kernel."""
    half = 2 ** (bits - 1)
    values, scale = codes(-half, half - 1, 5, 24), numbers(5, 3).abs()
    zeros = codes(-half, half - 1, 5, 3, seed=1) if zero_points else torch.zeros(5, 3, dtype=torch.int64)
    file = {
        "l.weight_packed": packed_rows(values, bits),
        "l.weight_scale": scale,
        "l.weight_shape": torch.tensor([5, 24]),
    }
    if zero_points:
        file["l.weight_zero_point"] = packed_rows(zeros.T, bits).T.contiguous()
    kernel = [
        [(int(values[o, i]) - int(zeros[o, i // 8])) * float(scale[o, i // 8]) for i in range(24)]
        for o in range(5)
    ]
    return file, torch.tensor(kernel)
