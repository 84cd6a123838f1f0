"""Matching of a file's tensors to a network's by shape and order, for files with other names.

Within each shape, the tensors of a file in the natural order of their names are those of the network in its
own order. Last parts of names that the network has as well must agree.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from mtlsign.models.tensor_names import is_counter
from mtlsign.models.unnamed_tensors.axis_orders import axis_orders, in_axis_order, is_stored_as
from mtlsign.models.unnamed_tensors.file_tensors import FileTensor

_Order = Sequence[int]


def match_by_order(shapes: Mapping[str, tuple[int, ...]], tensors: Sequence[FileTensor]) -> dict[str, Tensor]:
    """Return the network's tensors, found by shape and order; none if they do not fit one to one.

    All convolutions have their axes in one order, and all matrices in one order. The first orders that fit
    count. Vectors may be missing, as those of folded batch norms are; then none of their size is read.

    Args:
        shapes: of all tensors of the network, in its order.
        tensors: result of `file_tensors`.
    """
    shapes = {name: shape for name, shape in shapes.items() if shape and not is_counter(name)}
    leaves = {_leaf(name) for name in shapes}
    by_leaf = all(_leaf(tensor.name) in leaves for tensor in tensors)
    for orders in itertools.product(axis_orders(4), axis_orders(2)):
        matched = _matched(shapes, tensors, {4: orders[0], 2: orders[1]}, by_leaf=by_leaf)
        if matched:
            return matched
    return {}


def _matched(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Sequence[FileTensor],
    orders: Mapping[int, _Order],
    *,
    by_leaf: bool,
) -> dict[str, Tensor]:
    """Return the network's tensors under given orders of the axes; none if a matrix is left on one side."""
    matched: dict[str, Tensor] = {}
    remaining = dict(enumerate(tensors))
    for shape, leaf, names in _classes(shapes, by_leaf=by_leaf):
        order = orders.get(len(shape), range(len(shape)))
        fitting = {
            index: values
            for index, tensor in remaining.items()
            if not by_leaf or _leaf(tensor.name) == leaf
            for values in _fitting(tensor, shape, order)
        }
        if len(fitting) == len(names):
            matched |= dict(zip(names, fitting.values(), strict=True))
            remaining = {index: tensor for index, tensor in remaining.items() if index not in fitting}
        elif len(shape) > 1:
            return {}
    if any(sum(size > 1 for size in tensor.values.shape) > 1 for tensor in remaining.values()):
        return {}
    return _without_signs_of_unlikely_norms(matched)


def _classes(
    shapes: Mapping[str, tuple[int, ...]], *, by_leaf: bool
) -> Iterator[tuple[tuple[int, ...], str, list[str]]]:
    """Yield shape, last part of the name, and names; kernels before matrices before vectors."""
    classes: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        classes[shape, _leaf(name) if by_leaf else ""].append(name)
    for (shape, leaf), names in sorted(classes.items(), key=lambda item: -len(item[0][0])):
        yield shape, leaf, names


def _fitting(tensor: FileTensor, shape: tuple[int, ...], order: _Order) -> list[Tensor]:
    """Return the first variant of a tensor that fits a shape, as a kernel of this shape, or none."""
    if len(shape) == 1 and tensor.values.dim() != 1:
        return []
    variants = [v for v in tensor.variants if is_stored_as(tuple(v.shape), shape, order)]
    return [in_axis_order(variant, shape, order) for variant in variants[:1]]


def _without_signs_of_unlikely_norms(matched: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the vectors of norms if a running variance is negative: then their order is another one."""
    variances = [t for name, t in matched.items() if _leaf(name) == "running_var"]
    if all(bool((variance >= 0).all()) for variance in variances):
        return matched
    return {name: tensor for name, tensor in matched.items() if tensor.dim() > 1}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
