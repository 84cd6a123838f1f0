"""Labels of channels: one integer for each channel, in tensors of the shape of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

#: Label of numbers that belong to no channel, such as those of padding.
NO_CHANNEL = -1


@dataclass
class KernelChannels:
    """Labels of one kernel's rows and columns.

    Attributes:
        rows: int64 [O].
        columns: int64 [I], I over all groups; each label several times if positions were flattened.
        groups: the convolution's groups.
    """

    rows: Tensor
    columns: Tensor
    groups: int = 1


@dataclass
class ChannelLabels:
    """Result of `trace_channels`.

    Attributes:
        kernels: by parameter name, in order of first use.
        vectors: parameters and buffers with one number for each channel, int64 of their length.
        fixed: labels whose channels stay in their order.
        nonlinear: labels whose channels pass an operation that does not commute with a mix of channels.
    """

    kernels: dict[str, KernelChannels] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    nonlinear: set[int] = field(default_factory=set)


def spread(channels: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Return labels of a shape, equal but for one dimension; the other dimensions have stride 0."""
    sizes = [1] * len(shape)
    sizes[dim] = len(channels)
    return channels.reshape(sizes).expand(tuple(shape))


def compact(labels: Tensor) -> Tensor:
    """Return labels with one entry for each dimension of stride 0."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def aligned(tensor: Tensor, dims: int) -> Tensor:
    """Return a tensor with dimensions of 1 in front, as broadcasting adds them."""
    return tensor.reshape([1] * (dims - tensor.dim()) + list(tensor.shape)) if tensor.dim() < dims else tensor


def per_channel(labels: Tensor, dim: int) -> Tensor | None:
    """Return the labels along one dimension; None if they differ along another one."""
    lines = compact(labels).movedim(dim, 0).flatten(1)
    channels = lines.amax(1)
    same = (lines == channels[:, None]) | (lines == NO_CHANNEL)
    if not bool(same.all()):
        return None
    return channels.expand(labels.shape[dim]) if len(channels) == 1 else channels
