"""Tensors of a suspect's file as numbers, in the natural order of their names.

A file may be hostile. Tensors that are no plain finite floats are left out, and the sum of their sizes is
limited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights import DerivedWeights
from mtlsign.models.tensor_names import is_counter

#: Most tensors of a file, and most numbers in all of them: 1 GiB as float32.
MAX_TENSORS, MAX_NUMBERS = 10_000, 2**28
_MAX_DIMENSIONS = 8
_DIGITS = re.compile(r"([0-9]+)")
#: Pairs of axes that can be the positions of a kernel, and smallest number of positions with a rim.
_POSITION_AXES, _RIMMED = ((2, 3), (0, 1), (1, 2)), 3


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file, as one of the readings of its name.

    Attributes:
        name: name in the file, or the plain name of a kernel that is stored in another form.
        place: place in the natural order of names.
        values: float32 on the CPU, finite.
        variants: `values`, and `values` without a rim of zeros around the positions.
    """

    name: str
    place: int
    values: Tensor
    variants: tuple[Tensor, ...]


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key for which numbers within names are in the order of their values."""
    parts = _DIGITS.split(name[:1000])
    return tuple((0, int(p[:18]), p) if p.isdecimal() and p.isascii() else (1, 0, p) for p in parts)


def file_tensors(tensors: Mapping[str, Tensor]) -> list[FileTensor]:
    """Return the tensors of a file, those of several stored forms once for each form.

    Args:
        tensors: the file, of any origin.

    Returns:
        Floats with at least one dimension, in the natural order of their names.

    Raises:
        ModelError: the file has too many tensors or numbers.
    """
    if len(tensors) > MAX_TENSORS:
        raise ModelError(
            f"The file has over {MAX_TENSORS} tensors. Save the weights alone.", field="checkpoint"
        )
    views = DerivedWeights(tensors).alternatives()
    names = sorted((name for name in views[0] if not is_counter(name)), key=lambda n: (natural_order(n), n))
    readable, total = [], 0
    for place, name in enumerate(names):
        for view in {view.form_of(name): view for view in views}.values():
            values = _numbers(view, name)
            if values is None:
                continue
            total += values.numel()
            if total > MAX_NUMBERS:
                raise ModelError(
                    f"The file has over {MAX_NUMBERS} numbers. Save the weights alone.", field="checkpoint"
                )
            readable.append(FileTensor(name, place, values, _variants(values)))
    return readable


def _numbers(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a tensor as float32 on the CPU; None if it is damaged or has other contents."""
    try:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return None
        if tensor.dtype not in FLOATS or not 1 <= tensor.dim() <= _MAX_DIMENSIONS:
            return None
        if not 0 < tensor.numel() <= MAX_NUMBERS or tensor.untyped_storage().nbytes() < tensor.numel():
            return None  # an expanded tensor states more numbers than the file has
        values = tensor.detach().to("cpu", torch.float32)
        return values if bool(torch.isfinite(values).all()) else None
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception:  # a hostile object can raise anything
        return None


def _variants(values: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor, and the tensor without rims of zeros around the positions, if it has any."""
    variants = [values]
    for axes in _POSITION_AXES if values.dim() == 4 else ():
        inner = values
        while min(inner.shape[axis] for axis in axes) >= _RIMMED:
            smaller = inner
            for axis in axes:
                smaller = smaller.narrow(axis, 1, smaller.shape[axis] - 2)
            if int(smaller.count_nonzero()) != int(inner.count_nonzero()):
                break
            inner = smaller
            variants.append(inner)
    return tuple(variants)
