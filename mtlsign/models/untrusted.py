"""Tensors of a suspect model, selected and checked by the verifier.

A suspect's file may be hostile. Problems are therefore returned as reasons instead of being raised, and no
reason quotes a name of the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import FLOATS
from mtlsign.models.derived_weights import DerivedWeights
from mtlsign.models.families import translation_of
from mtlsign.models.tensor_names import (
    MAX_MAPPINGS,
    NameMapping,
    is_name_of,
    names_in_any_network,
    suspect_mappings,
)

#: Largest ratio of a suspect's rows or input columns to those of W0; an attacker can add channels.
MAX_GROWTH = 4


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
    resizable: Collection[str] = (),
) -> Iterator[MappedTensors]:
    """Select only the requested tensors of a suspect model, once for each place where the file has them.

    At least one result is yielded, and at most `MAX_MAPPINGS` of `models/tensor_names.py`. Each is made when
    it is requested, so that the caller can release one before the next. Half, bfloat16 and double become
    float32; quantised and reparametrised kernels are computed (`DerivedWeights`). NaN, infinity, other types,
    wrong shapes and missing names are a `problem`. An optional tensor that is damaged counts as absent.
    Nothing is raised because of the file.

    Args:
        shapes: required tensors, name -> shape.
        tensors: the suspect's tensors, of any origin.
        optional: tensors that may be missing, name -> shape.
        tolerated: names of tensors that may be missing or damaged as long as one required tensor remains.
        resizable: names of kernels that may have other numbers of rows and input columns, up to
            `MAX_GROWTH` times as many, and of vectors that may have other numbers of elements.
    """
    try:
        readings = _readings(shapes, tensors, optional or {}, tolerated)
    except ModelError as error:
        yield MappedTensors({}, str(error))
        return
    except Exception as error:  # a hostile object can raise anything
        yield MappedTensors({}, f"the tensors cannot be read ({type(error).__name__})")
        return
    for view, mapping in readings:
        yield _selected(mapping, shapes, view, optional or {}, tolerated, resizable)


def _readings(
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    optional: Mapping[str, Sequence[int]],
    tolerated: Collection[str],
) -> list[tuple[DerivedWeights, NameMapping]]:
    """Return the distinct pairs of a view on the file's stored forms and a mapping of the names.

    Raises:
        ModelError: there is none, or there are more than `MAX_MAPPINGS`.
    """
    names, omissible = {**optional, **shapes}, set(optional) - set(shapes)
    views = DerivedWeights(tensors).alternatives()  # they have the same names
    mappings = suspect_mappings(names, views[0], optional=omissible, tolerated=tolerated)
    distinct: dict[tuple[tuple[str, int], ...], tuple[DerivedWeights, NameMapping]] = {}
    for view, mapping in itertools.product(views, mappings):
        sources = tuple(sorted((source, view.form_of(source)) for source in mapping.values()))
        distinct.setdefault(sources, (view, mapping))
    if len(distinct) > MAX_MAPPINGS:
        raise ModelError(
            f"The weights exist in over {MAX_MAPPINGS} places of the file. Keep one of them.",
            field="checkpoint",
        )
    return list(distinct.values())


def _selected(
    mapping: NameMapping,
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    optional: Mapping[str, Sequence[int]],
    tolerated: Collection[str],
    resizable: Collection[str],
) -> MappedTensors:
    values: dict[str, Tensor] = {}
    for name, source in mapping.items():
        required = name in shapes
        shape = tuple((shapes if required else optional)[name])
        problem, value = _validated_tensor(tensors, source, shape, resizable=name in resizable)
        if value is not None:
            values[name] = value
        elif required and name not in tolerated:
            return MappedTensors({}, f"{name!r} {problem}")
    missing = tuple(name for name in shapes if name in tolerated and name not in values)
    if missing and len(missing) == len(shapes):
        return MappedTensors({}, "none of the layers can be read")
    return MappedTensors(values, None, missing)


def _validated_tensor(
    tensors: Mapping[str, Tensor], source: str, shape: tuple[int, ...], *, resizable: bool
) -> tuple[str, Tensor | None]:
    """Return a tensor as float32, or a description of what is wrong with it."""
    try:
        tensor = tensors[source]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            return "is no plain tensor", None
        tensor = _without_zero_rim(tensor, shape)
        if tuple(tensor.shape) != shape and not (resizable and _is_resized(tuple(tensor.shape), shape)):
            return f"is {list(tensor.shape)} and should be {list(shape)}", None
        if tensor.dtype not in FLOATS:
            return f"is {tensor.dtype}; only float16, bfloat16, float32 and float64 are supported", None
        value = tensor.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(value).all()):
            return "holds NaN or infinity", None
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # a hostile object can raise anything
        return f"cannot be read ({type(error).__name__})", None
    return "", value


def _without_zero_rim(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a kernel without the zeros around its positions, if it has as many on both sides.

    Such a kernel computes the same with a larger padding.
    """
    extra = [size - target for size, target in zip(tensor.shape[2:], shape[2:], strict=False)]
    rims = [count // 2 for count in extra]
    if tensor.dim() != len(shape) or not any(extra) or any(e < 0 or e % 2 for e in extra):
        return tensor
    inner = tensor
    for dim, (rim, target) in enumerate(zip(rims, shape[2:], strict=True), start=2):
        inner = inner.narrow(dim, rim, target)
    return inner if int(inner.count_nonzero()) == int(tensor.count_nonzero()) else tensor


def _is_resized(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a kernel differs from the expected one in its numbers of rows and columns alone.

    A vector may have another number of elements.
    """
    return (
        len(shape) == len(expected) >= 1
        and shape[2:] == expected[2:]
        and all(1 <= size <= MAX_GROWTH * other for size, other in zip(shape[:2], expected[:2], strict=True))
    )


def has_unread_tensors(names: Collection[str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a matrix or kernel of a file is no tensor of an architecture under any prefix.

    Args:
        names: names of the architecture's tensors.
        tensors: the suspect's tensors, of any origin.
    """
    try:
        names = names_in_any_network(names)
        view = DerivedWeights(tensors).alternatives()[0]
        sources = sorted(name for name in view if isinstance(name, str))
        return any(
            _has_rows_and_columns(view, source)
            for source in sources
            if not any(is_name_of(target, names) for target in _spellings(source))
        )
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception:  # a hostile object can raise anything
        return True


def _spellings(source: str) -> list[str]:
    """Return a name of a file, and this package's name of it."""
    translation = translation_of(source)
    return [source] if translation is None else [source, translation.target]


def _has_rows_and_columns(tensors: Mapping[str, Tensor], source: str) -> bool:
    """Return whether a tensor can be read, and has two or more dimensions of over 1."""
    try:
        tensor = tensors[source]
        return isinstance(tensor, Tensor) and sum(size > 1 for size in tensor.shape) >= 2
    except (OSError, MemoryError):
        raise
    except Exception:
        return True
