"""Linear channels: those of a bottleneck without an activation, which any invertible matrix can mix.

In MobileNetV2 (arXiv 1801.04381) and its successors a 1x1 convolution and a batch norm write a few channels,
additions join those of several blocks, and the convolution of the next block reads them. Multiplying the
channels by an invertible matrix where they are written, and by its inverse where they are read, preserves
the function. The product of a kernel that reads them and one that writes them remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.models import channel_groups
from mtlsign.models.channel_sets import ChannelSet, ChannelStructure
from mtlsign.models.taps import TappedLayer

#: Ending of a product's name, after that of the module that reads the channels.
SUFFIX = ".product"
#: Most elements of one product.
MAX_ELEMENTS = 2**24


def is_mixable(model: nn.Module, channels: ChannelSet, batch_norms: Mapping[str, str]) -> bool:
    """Return whether any invertible matrix can mix the channels of a set.

    They are all channels of kernels with batch norms, and only linear operations are between these and the
    kernels that read them.

    Args:
        model: the network.
        channels: one of its channel sets.
        batch_norms: batch norm that receives a layer's unchanged output, by module name.
    """
    names = [*channels.rows, *channels.columns]
    owners = [channel_groups.owner_of(model, name) for name in names]
    if channels.activated or channels.blocks != 1 or not channels.columns:
        return False
    if not all(isinstance(owner, _ConvNd | nn.Linear) for owner in owners):
        return False
    if any(int(getattr(owner, "groups", 1)) != 1 for owner in owners):
        return False
    writers = {name.rpartition(".")[0] for name in channels.rows}
    norms = {batch_norms.get(writer) for writer in writers}
    modules = {name.rpartition(".")[0] for name in channels.vectors}
    return None not in norms and modules <= writers | norms and _fills(model, channels)


def _fills(model: nn.Module, channels: ChannelSet) -> bool:
    """Return whether the channels are all rows of their writers."""
    return all(
        len(channel_groups.tensors_of(model)[name]) == channels.size == len(rows)
        for name, rows in channels.rows.items()
    )


@dataclass(frozen=True)
class LinearProduct:
    """Product of a kernel that reads linear channels and the last kernel before it that writes them.

    Attributes:
        reader: module that reads the channels.
        writer: module that writes them.
        writer_norm: batch norm after the writer.
        reader_norm: batch norm after the reader; None without one.
        channels: number of channels between both kernels.
        shape: of the product, [O, I] or [O, I, height, width].
        window_of: the one of both modules whose window the product has.
    """

    reader: str
    writer: str
    writer_norm: str
    reader_norm: str | None
    channels: int
    shape: tuple[int, ...]
    window_of: str

    @property
    def name(self) -> str:
        """Name of the product as a kernel, and of its layer in a reference."""
        return f"{self.reader}{SUFFIX}"

    @property
    def weights(self) -> tuple[str, str]:
        """Names of the reader's and the writer's kernel."""
        return f"{self.reader}.weight", f"{self.writer}.weight"

    @property
    def vectors(self) -> tuple[str, str]:
        """Names of γ and the running variance of the batch norm after the writer."""
        return f"{self.writer_norm}.weight", f"{self.writer_norm}.running_var"

    @property
    def layer(self) -> TappedLayer:
        """The product as a layer."""
        return TappedLayer(self.reader, self.reader_norm, "product", self.name)


def linear_products(
    model: nn.Module, layers: Sequence[TappedLayer], structure: ChannelStructure
) -> list[LinearProduct]:
    """Return the products across the linear channels of a network, in execution order of their readers.

    Args:
        model: the network; its values have no influence.
        layers: result of `tapped_layers`.
        structure: its channels up to the same taps.

    Returns:
        At most one product for each reader. It has none if the set holds a part of its columns only, or
        another order of them, if no writer runs before it, if both have windows, or if the product had over
        2^24 elements. A writer that is the last before no reader is in no product.
    """
    batch_norms = {layer.conv: layer.batch_norm for layer in layers if layer.batch_norm is not None}
    order = [layer.weight for layer in layers if layer.kind in ("conv", "linear")]
    products = {}
    for channels in structure.sets:
        if not is_mixable(model, channels, batch_norms):
            continue
        writer: str | None = None
        for weight in order:
            if weight in channels.columns and writer is not None and _reads_all(model, channels, weight):
                product = _product(model, weight, writer, batch_norms)
                if product is not None:
                    products[weight] = product
            if weight in channels.rows:
                writer = weight if _in_order(channels.rows[weight]) else None
    return [products[weight] for weight in order if weight in products]


def _in_order(places: object) -> bool:
    numbers = np.asarray(places)
    return bool((numbers == np.arange(len(numbers))).all())


def _reads_all(model: nn.Module, channels: ChannelSet, weight: str) -> bool:
    """Return whether the columns of a kernel are the channels in their order."""
    places = channels.columns[weight]
    columns = channel_groups.tensors_of(model)[weight].shape[1]
    return places.shape == (columns, 1) and _in_order(places[:, 0])


def _product(
    model: nn.Module, reading: str, writing: str, batch_norms: Mapping[str, str]
) -> LinearProduct | None:
    """Return the product of two kernels; None if it is not read."""
    reader, writer = reading.rpartition(".")[0], writing.rpartition(".")[0]
    modules = [model.get_submodule(name) for name in (reader, writer)]
    if not all(isinstance(module, nn.Conv2d | nn.Linear) for module in modules):
        return None
    windows = [tuple(getattr(module, "kernel_size", ())) for module in modules]
    outer, inner = channel_groups.tensors_of(model)[reading], channel_groups.tensors_of(model)[writing]
    sizes = [torch.Size(window).numel() for window in windows]
    if min(sizes) > 1 or (sizes[0] > 1 and getattr(modules[1], "stride", (1, 1)) != (1, 1)):
        return None
    window_of = reader if sizes[0] > 1 or not windows[1] else writer
    shape = (len(outer), inner.shape[1], *windows[window_of == writer])
    if torch.Size(shape).numel() > MAX_ELEMENTS:
        return None
    return LinearProduct(
        reader, writer, batch_norms[writer], batch_norms.get(reader), len(inner), shape, window_of
    )
