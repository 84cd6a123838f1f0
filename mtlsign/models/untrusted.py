"""Tensors of a suspect model, selected and checked by the verifier.

A suspect's file may be hostile. Problems are therefore returned as reasons instead of being raised.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.tensor_names import map_names


@dataclass(frozen=True)
class MappedTensors:
    """Tensors of a suspect under the requested names, or no tensors and the reason.

    Attributes:
        tensors: float32 on the CPU, by the verifier's name.
        problem: the reason why the tensors could not be selected; None if they were.
        missing: tolerated tensors that are missing or damaged.
    """

    tensors: Mapping[str, Tensor]
    problem: str | None
    missing: tuple[str, ...] = ()


def select_tensors_untrusted(
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    *,
    optional: Mapping[str, Sequence[int]] | None = None,
    tolerated: Collection[str] = (),
) -> MappedTensors:
    """Select only the requested tensors of a suspect model. Never raises.

    Half, bfloat16 and double become float32. NaN, infinity, other types, wrong shapes, missing names and
    ambiguous names are a `problem`.

    Args:
        shapes: required tensors, name -> shape.
        tensors: the suspect's tensors, of any origin.
        optional: tensors that may be missing, name -> shape.
        tolerated: names of tensors that may be missing or damaged as long as one required tensor remains.
    """
    expected = {**(optional or {}), **shapes}
    values: dict[str, Tensor] = {}
    try:
        names = map_names(
            expected, tensors, optional=set(optional or {}) - set(shapes), strict=True, tolerated=tolerated
        )
        for name, source in names.items():
            problem, value = _validated_tensor(tensors[source], tuple(expected[name]))
            if value is None:
                if name in tolerated:
                    continue
                return MappedTensors({}, f"{source[:80]!r} {problem}")
            values[name] = value
    except ModelError as error:
        return MappedTensors({}, str(error))
    except Exception as error:  # a hostile object can raise anything
        return MappedTensors({}, f"the tensors cannot be read ({type(error).__name__})")
    missing = tuple(name for name in shapes if name in tolerated and name not in values)
    if missing and len(missing) == len(shapes):
        return MappedTensors({}, "none of the layers can be read")
    return MappedTensors(values, None, missing)


def _validated_tensor(tensor: Tensor, shape: tuple[int, ...]) -> tuple[str, Tensor | None]:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return "is no plain tensor", None
    if tuple(tensor.shape) != shape:
        return f"is {list(tensor.shape)} and should be {list(shape)}", None
    if tensor.dtype not in FLOATS:
        return f"is {tensor.dtype}; only float16, bfloat16, float32 and float64 are supported", None
    value = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(value).all()):
        return "holds NaN or infinity", None
    return "", value
