"""Flow of channels through a network: the rows and columns of its kernels that belong to one channel.

The network runs once. An activation has integer labels in its shape, one label for each channel, and
every operation passes the labels on. A convolution makes new labels; an addition joins the labels of its
operands. Channels that pass an unknown operation are fixed: no permutation of them is considered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mtlsign.models import channel_operations as operations
from mtlsign.models.channel_labels import (
    NO_CHANNEL,
    ChannelLabels,
    KernelChannels,
    aligned,
    compact,
    per_channel,
    spread,
)
from mtlsign.models.taps import eval_mode, forward_to_taps


def trace_channels(model: nn.Module, taps: Sequence[str], sample: Tensor) -> ChannelLabels:
    """Follow the channels of a network up to its last tap.

    Args:
        model: the network, in any mode; its values have no influence.
        taps: module names.
        sample: one batch [n, C, H, W]; only its shape matters.

    Raises:
        ModelError: as `forward_to_taps`.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    tracer = _Tracer(tensors, sample)
    with eval_mode(model), tracer:
        forward_to_taps(model, sample, taps)
    return tracer.result()


#: Errors of an operation whose arguments have an unexpected form; its channels are fixed.
_UNFOLLOWED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, StopIteration)


class _Tracer(TorchDispatchMode):
    def __init__(self, tensors: Mapping[str, Tensor], sample: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        self._nonlinear: set[int] = set()
        self._kernels: dict[str, KernelChannels] = {}
        self._vectors: dict[str, Tensor] = {}
        #: Parameter, or a view of it: its name, and whether rows and columns have changed places.
        self._weights: dict[int, tuple[str, bool]] = {id(t): (name, False) for name, t in tensors.items()}
        self._labels: dict[int, Tensor] = {}
        self._alive: list[Any] = [*tensors.values(), sample]
        inputs = self._new(sample.shape[1])
        self._fixed |= set(inputs.tolist())
        self._set(sample, spread(inputs, sample.shape, 1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._alive += [result, *leaves]
        if any(id(leaf) in self._labels for leaf in leaves):
            if name not in operations.LINEAR:
                self._nonlinear |= self._labels_of(leaves)
            try:
                handled = self._pass_on(name, func, args, kwargs, result)
            except _UNFOLLOWED:
                handled = False
            if not handled:
                self._fix_all(leaves)
                self._set_unknown(result)
        elif leaves and id(leaves[0]) in self._weights and isinstance(result, Tensor):
            self._view_weight(name, args, result)
        return result

    def _pass_on(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> bool:
        """Label the result of one operation; return whether the operation is known."""
        first = args[0] if args else None
        labels = self._labels.get(id(first)) if isinstance(first, Tensor) else None
        if name in operations.CONVOLUTIONS:
            return labels is not None and self._convolution(args, kwargs, labels, result)
        if name in ("addmm", "mm", "linear"):
            return self._linear(name, args, result)
        if name in operations.BATCH_NORMS:
            return labels is not None and self._batch_norm(args, labels, result)
        if name == "native_layer_norm":
            return labels is not None and self._layer_norm(args, labels, result)
        if name in operations.MOVES or name in operations.PADS:
            return self._move(name, func, args, kwargs, result)
        if name in operations.BINARY and sum(isinstance(a, Tensor) for a in args) > 1:
            return self._binary(args, result)
        if labels is None or not isinstance(first, Tensor):
            return False
        if name in operations.POINTWISE or name in operations.BINARY:
            if name in ("prelu", "_prelu_kernel") and not self._vector(args[1], labels, 1):
                return False
            self._set(_first_tensor(result), labels)
            return True
        if name in operations.POOLS:
            return self._pool(labels, _first_tensor(result))
        if name in operations.REDUCTIONS:
            return self._reduce(labels, args, kwargs, _first_tensor(result))
        return False

    def _convolution(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor, result: Tensor
    ) -> bool:
        transposed = bool(args[6]) if len(args) > 6 else False
        groups = int(args[8]) if len(args) > 8 else int(kwargs.get("groups", 1))
        weight = self._weights.get(id(args[1]))
        columns = per_channel(labels, 1)
        if weight is None or weight[1] or transposed or columns is None or result.dim() < 3:
            return False
        name, outputs = weight[0], result.shape[1]
        depthwise = groups > 1 and groups == len(columns) == outputs
        rows = columns if depthwise else self._new(outputs)
        if groups > 1:
            self._nonlinear |= {*columns.tolist(), *rows.tolist()}
        self._record(name, rows, columns, groups)
        if len(args) > 2 and isinstance(args[2], Tensor) and not self._record_vector(args[2], rows):
            return False
        self._set(result, spread(self._kernels[name].rows, result.shape, 1))
        return True

    def _linear(self, name: str, args: tuple[Any, ...], result: Tensor) -> bool:
        """Label the result of x·Wᵀ + b."""
        bias, x, weight = args if name == "addmm" else (None, args[0], args[1])
        if name == "linear" and len(args) > 2:
            bias = args[2]
        labels, source = self._labels.get(id(x)), self._weights.get(id(weight))
        columns = None if labels is None else per_channel(labels, -1)
        if columns is None or source is None or source[1] is (name == "linear"):
            return False
        rows = self._new(result.shape[-1])
        self._record(source[0], rows, columns, 1)
        if isinstance(bias, Tensor) and not self._record_vector(bias, rows):
            return False
        self._set(result, spread(self._kernels[source[0]].rows, result.shape, -1))
        return True

    def _batch_norm(self, args: tuple[Any, ...], labels: Tensor, result: Any) -> bool:
        channels = per_channel(labels, 1)
        if channels is None:
            return False
        for tensor in args[1:5]:
            if isinstance(tensor, Tensor) and not self._record_vector(tensor, channels):
                return False
        self._set(_first_tensor(result), labels)
        return True

    def _layer_norm(self, args: tuple[Any, ...], labels: Tensor, result: Any) -> bool:
        if len(args[1]) != 1:
            return False
        channels = per_channel(labels, -1)
        for tensor in args[2:4]:
            if isinstance(tensor, Tensor) and (channels is None or not self._record_vector(tensor, channels)):
                return False
        self._set(_first_tensor(result), labels)
        return True

    def _move(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        def shadow(tensor: Tensor) -> Tensor:
            labels = self._labels.get(id(tensor))
            return torch.full_like(tensor, NO_CHANNEL, dtype=torch.int64) if labels is None else labels

        if name in operations.PADS:
            value = (NO_CHANNEL,) if name == "constant_pad_nd" else ()
            moved = func(shadow(args[0]).contiguous(), args[1], *value)
        elif name == "as_strided":
            return False
        elif name in ("view", "_unsafe_view", "_reshape_alias"):
            moved = shadow(args[0]).reshape(result.shape)
        else:
            moved = func(*tree_map_only(Tensor, shadow, args), **tree_map_only(Tensor, shadow, kwargs))
        for tensor, labels in zip(_tensors(result), _tensors(moved), strict=True):
            self._set(tensor, labels)
        return True

    def _binary(self, args: tuple[Any, ...], result: Tensor) -> bool:
        tensors = [a for a in args if isinstance(a, Tensor)]
        known = [self._labels[id(t)] for t in tensors if id(t) in self._labels]
        operands = [compact(aligned(labels, result.dim())) for labels in known]
        merged = operands[0]
        for other in operands[1:]:
            first, second = torch.broadcast_tensors(merged, other)
            both = (first >= 0) & (second >= 0)
            pairs = torch.stack([first[both], second[both]], 1).unique(dim=0)
            for one, two in pairs.tolist():
                self._join(one, two)
            merged = torch.where(first >= 0, first, second)
        labels = merged.expand(result.shape)
        for tensor in tensors:
            if id(tensor) not in self._labels and not self._operand(tensor, labels):
                return False
        self._set(result, labels)
        return True

    def _operand(self, tensor: Tensor, labels: Tensor) -> bool:
        """Read a constant operand: a vector along one dimension, or a number."""
        if tensor.numel() == 1:
            return True
        sizes = aligned(tensor, labels.dim()).shape
        dims = [dim for dim, size in enumerate(sizes) if size > 1]
        if id(tensor) not in self._weights:
            shape = compact(labels).shape  # a constant of the network's code: the same for all channels?
            return all(shape[dim] == 1 for dim in dims)
        return len(dims) == 1 and self._vector(tensor, labels, dims[0])

    def _vector(self, tensor: Tensor, labels: Tensor, dim: int) -> bool:
        channels = per_channel(labels, dim)
        return tensor.numel() == 1 or (channels is not None and self._record_vector(tensor, channels))

    def _pool(self, labels: Tensor, result: Tensor) -> bool:
        channels = per_channel(labels, 1)
        if channels is None:
            return False
        self._set(result, spread(channels, result.shape, 1))
        return True

    def _reduce(self, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
        dims = next((a for a in args[1:] if isinstance(a, list | tuple)), None)
        if dims is None:
            dims = next(([a] for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), None)
        if not dims or any(labels.stride(dim) and labels.shape[dim] > 1 for dim in dims):
            return False
        for dim in sorted((d % labels.dim() for d in dims), reverse=True):
            labels = labels.select(dim, 0)
        if labels.numel() != result.numel():
            return False
        self._set(result, labels.reshape(result.shape))
        return True

    def _view_weight(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        """Remember a view of a parameter that keeps its numbers' meaning."""
        source, transposed = self._weights[id(args[0])]
        if name in ("t",) or (name in ("transpose", "permute") and args[0].dim() == 2):
            self._weights[id(result)] = (source, not transposed)
        elif name in ("detach", "alias", "_to_copy", "contiguous", "clone") or (
            name in ("view", "_unsafe_view", "reshape", "unsqueeze") and args[0].dim() == 1
        ):
            self._weights[id(result)] = (source, transposed)

    def _record(self, name: str, rows: Tensor, columns: Tensor, groups: int) -> None:
        """Record a use of a kernel; a kernel that is used again joins the labels of both uses."""
        known = self._kernels.get(name)
        if known is None:
            self._kernels[name] = KernelChannels(rows, columns, groups)
        elif len(known.columns) == len(columns) and len(known.rows) == len(rows):
            for one, two in zip([*known.rows, *known.columns], [*rows, *columns], strict=True):
                self._join(int(one), int(two))

    def _record_vector(self, tensor: Tensor, channels: Tensor) -> bool:
        """Record the channels of a vector parameter; return whether their numbers agree."""
        source = self._weights.get(id(tensor))
        if source is None or tensor.numel() != len(channels):
            return False
        known = self._vectors.setdefault(source[0], channels)
        for one, two in zip(known.tolist(), channels.tolist(), strict=True):
            self._join(one, two)
        return True

    def _fix_all(self, tensors: Sequence[Tensor]) -> None:
        self._fixed |= self._labels_of(tensors)

    def _labels_of(self, tensors: Sequence[Tensor]) -> set[int]:
        known = [compact(self._labels[id(t)]) for t in tensors if id(t) in self._labels]
        return {label for labels in known for label in labels.unique().tolist()}

    def _set_unknown(self, result: Any) -> None:
        """Give the results of an unknown operation one new label, which is fixed."""
        label = self._new(1)
        self._fixed |= set(label.tolist())
        for tensor in _tensors(result):
            if tensor.is_floating_point():
                self._set(tensor, label.expand(tuple(tensor.shape)) if tensor.dim() else label[0])

    def _set(self, tensor: Tensor, labels: Tensor) -> None:
        self._labels[id(tensor)] = labels

    def _new(self, count: int) -> Tensor:
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def _join(self, one: int, two: int) -> None:
        if NO_CHANNEL in (one, two):
            self._fixed |= {one, two}
            return
        roots = self._root(one), self._root(two)
        self._parents[max(roots)] = min(roots)

    def result(self) -> ChannelLabels:
        """Return the labels with one name for each channel."""

        def roots(labels: Tensor) -> Tensor:
            return torch.tensor([NO_CHANNEL if x < 0 else self._root(x) for x in labels.tolist()])

        kernels = {
            name: KernelChannels(roots(k.rows), roots(k.columns), k.groups)
            for name, k in self._kernels.items()
        }
        vectors = {name: roots(labels) for name, labels in self._vectors.items()}
        fixed = {self._root(label) for label in self._fixed if label >= 0}
        nonlinear = {self._root(label) for label in self._nonlinear if label >= 0}
        return ChannelLabels(kernels, vectors, fixed, nonlinear)


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _first_tensor(result: Any) -> Tensor:
    return next(_tensors(result))
