"""Weights of an ONNX model, read as data. No node is executed by a runtime.

Exporters fold, transpose and split weights. Nodes of a closed list whose inputs are all constants are
computed; all other nodes are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.checkpoints import MAX_BYTES
from mtlsign.models.derived_weights.companions import MAX_DIMENSIONS, MAX_VALUES

_Array = npt.NDArray[Any]
_Attributes = Mapping[str, Any]

#: Most nodes of a graph, and most numbers in all computed constants together.
MAX_NODES, MAX_COMPUTED = 100_000, 2**29


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Return the constants of an ONNX model by name: initialisers, and results of constant nodes.

    Constants that only computed nodes read are left out.

    Args:
        path: the file; constants in further files are refused.

    Raises:
        ImportError: the library onnx is missing.
        ModelError: the file is too large, has constants in further files, or computes too large ones.
    """
    import onnx
    from onnx import numpy_helper

    if path.stat().st_size > MAX_BYTES:
        raise ModelError(
            f"{path} is larger than {MAX_BYTES >> 30} GiB. Give the weights alone.", field="source"
        )
    graph = onnx.load(str(path), load_external_data=False).graph
    if any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in graph.initializer):
        raise ModelError(
            f"{path} has weights in further files. Save it with all weights in one file.", field="source"
        )
    if len(graph.node) > MAX_NODES:
        raise ModelError(f"{path} has over {MAX_NODES} nodes. Give the weights alone.", field="source")
    constants: dict[str, _Array] = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    computed = _fold(graph.node, constants, readers)
    return {
        name: torch.from_numpy(np.array(value))
        for name, value in constants.items()
        if name not in computed and value.dtype.kind in "fiub"
    }


def _fold(nodes: Sequence[Any], constants: dict[str, _Array], readers: Counter[str]) -> set[str]:
    """Compute constant nodes in their order; return the constants that no other node reads."""
    from onnx import helper

    total = 0
    for node in nodes:
        operator = _OPERATORS.get(node.op_type) if not node.domain and len(node.output) == 1 else None
        names = [name for name in node.input if name]
        if operator is None or any(name not in constants for name in names):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        value = operator([constants[name] for name in names], attributes)
        if value is None:
            continue
        total += value.size
        if total > MAX_COMPUTED:
            raise ModelError(
                f"The constants of the graph have over {MAX_COMPUTED} numbers. Export the weights alone.",
                field="source",
            )
        constants[node.output[0]] = value
        readers.subtract(names)
    return {name for name in constants if name in readers and readers[name] == 0}


def _constant(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    from onnx import numpy_helper

    value = attributes.get("value")
    return None if value is None else np.asarray(numpy_helper.to_array(value))


def _transpose(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    order = attributes.get("perm", range(inputs[0].ndim)[::-1])
    return np.transpose(inputs[0], list(order))


def _reshape(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    value, target = inputs[0], [int(size) for size in inputs[1].reshape(-1)[: MAX_DIMENSIONS + 1]]
    if len(target) > MAX_DIMENSIONS:
        return None
    return value.reshape([value.shape[axis] if size == 0 else size for axis, size in enumerate(target)])


def _squeeze(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    return inputs[0].reshape([size for size in inputs[0].shape if size != 1])


def _binary(function: Callable[[_Array, _Array], _Array]) -> Callable[..., _Array | None]:
    """Return the operator of two inputs, if their result is not too large."""

    def compute(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
        one, other = inputs
        sizes = np.broadcast_shapes(one.shape, other.shape)
        if int(np.prod(sizes, dtype=np.float64)) > MAX_VALUES or len(sizes) > MAX_DIMENSIONS:
            return None
        return np.asarray(function(one, other))

    return compute


def _product(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    one, other = inputs
    if one.ndim != 2 or other.ndim != 2 or len(one) * other.shape[1] > MAX_VALUES:
        return None
    return np.asarray(one @ other)


def _dequantized(inputs: Sequence[_Array], attributes: _Attributes) -> _Array | None:
    """Return (q − z)·scale with one scale for all numbers or for each place along an axis."""
    codes, scale = inputs[0], np.asarray(inputs[1], dtype=np.float32)
    zero = np.asarray(inputs[2], dtype=np.float32) if len(inputs) > 2 else np.float32(0)
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * codes.ndim
        shape[int(attributes.get("axis", 1))] = scale.size
        scale, zero = scale.reshape(shape), np.broadcast_to(zero, scale.shape).reshape(shape)
    return np.asarray((codes.astype(np.float32) - zero) * scale, dtype=np.float32)


_OPERATORS: Mapping[str, Callable[[Sequence[_Array], _Attributes], _Array | None]] = {
    "Constant": _constant,
    "Identity": lambda inputs, attributes: inputs[0],
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(np.divide),
    "MatMul": _product,
    "DequantizeLinear": _dequantized,
}
