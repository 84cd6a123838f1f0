"""Stored tensors of one layer, from which its kernel is computed.

They come from a suspect's file. Each is checked before anything is allocated for it, and no message quotes a
name of the file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import FLOATS

#: Most values of a computed kernel: 256 MiB as float32.
MAX_VALUES = 64 * 2**20
MAX_DIMENSIONS = 8
FLOAT8S = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
#: Types of 8 bits that hold the values of a kernel.
CODES = (torch.int8, torch.uint8, *FLOAT8S)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def misfit(problem: str) -> ModelError:
    """Return the error for companions that fit no rule. `problem` is a sentence without its full stop."""
    return ModelError(f"{problem}. Save the weights as plain floats.", field="checkpoint")


def check_size(count: int) -> None:
    """Raise `ModelError` if a computed kernel would have no values or more than `MAX_VALUES`."""
    if not 0 < count <= MAX_VALUES:
        raise misfit(f"A stored kernel is empty or has over {MAX_VALUES} values")


@dataclass(frozen=True)
class Companions:
    """Tensors of a file whose names begin with the prefix of a layer.

    Attributes:
        tensors: the file.
        names: the names in the file.
        prefix: name of the layer with its dot; empty for a layer without a name.
    """

    tensors: Mapping[str, Tensor]
    names: Set[str]
    prefix: str

    def __contains__(self, suffix: object) -> bool:
        return isinstance(suffix, str) and self.prefix + suffix in self.names

    def read(self, suffix: str, dtypes: Collection[torch.dtype]) -> Tensor:
        """Return a companion on the CPU. Raises `ModelError` if it is no plain tensor of one of the types."""
        tensor = self.tensors[self.prefix + suffix]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise misfit("A stored kernel has a companion that is no plain tensor")
        if tensor.dtype not in dtypes:
            raise misfit("A stored kernel has a companion of an unexpected type")
        check_size(tensor.numel())
        return tensor.detach().cpu()

    def numbers(self, suffix: str, dtypes: Collection[torch.dtype] = FLOATS) -> Tensor:
        """Return a companion as float32. Raises `ModelError` as `read` and `as_float32`."""
        return as_float32(self.read(suffix, dtypes))


def as_float32(tensor: Tensor) -> Tensor:
    """Return a tensor as float32. Raises `ModelError` if it holds NaN or infinity."""
    numbers = tensor.to(torch.float32)
    if not bool(torch.isfinite(numbers).all()):
        raise misfit("A stored kernel or a companion of it holds NaN or infinity")
    return numbers


def kernel_shape(sizes: Collection[object]) -> tuple[int, ...]:
    """Return the shape of a kernel that a file states. Raises `ModelError` for one that is not plausible."""
    shape = tuple(size for size in sizes if isinstance(size, int) and not isinstance(size, bool))
    if len(shape) != len(sizes) or not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
        raise misfit("A stored kernel states no valid shape")
    check_size(math.prod(shape))
    return shape
