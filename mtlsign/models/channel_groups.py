"""Channels that can be scaled or permuted together without changing the function of a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.models.channel_sets import ChannelSet, ChannelStructure, channel_structure
from mtlsign.models.taps import last_layer, tapped_layers


def network_channels(model: nn.Module, sample: Tensor) -> ChannelStructure:
    """Return the channels of a whole network, up to the last layer that it calls.

    Args:
        model: any network.
        sample: images [n, C, H, W] that the network accepts; only their shape matters.

    Raises:
        ModelError: the forward pass calls no module.
    """
    on_cpu, sample = copy.deepcopy(model).cpu(), sample.cpu()
    return channel_structure(on_cpu, (last_layer(on_cpu, sample),), sample)


def batch_norm_of_conv(model: nn.Module, sample: Tensor) -> dict[str, str]:
    """Return the batch norm that receives each convolution's unchanged output, by module name.

    Args:
        model: any network.
        sample: float32 [1, C, H, W], an input that the network accepts.
    """
    layers = tapped_layers(model, (last_layer(model, sample),), sample)
    return {layer.conv: layer.batch_norm for layer in layers if layer.batch_norm is not None}


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution whose every row reads the channel of its number alone."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def writing_kernels(model: nn.Module, channels: ChannelSet) -> list[str]:
    """Return the kernels that compute the channels from others; depthwise kernels only pass them on."""
    return [name for name in channels.rows if not is_depthwise(owner_of(model, name))]


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a parameter or buffer."""
    return model.get_submodule(name.rpartition(".")[0])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, shared ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


@torch.no_grad()
def scale_channels(
    model: nn.Module, channels: ChannelSet, factors: Tensor, batch_norms: Mapping[str, str]
) -> None:
    """Multiply channels where they are written, and divide where they are read, in place.

    Args:
        model: the network.
        channels: one of its channel sets.
        factors: numbers above 0, [size].
        batch_norms: result of `batch_norm_of_conv`. A kernel that one follows stays, and the batch norm is
            scaled.
    """
    tensors = tensors_of(model)

    def multiply(name: str, places: Collection[int], numbers: Tensor) -> None:
        scale = torch.ones(tensors[name].numel() if tensors[name].dim() == 1 else len(tensors[name]))
        scale = scale.to(numbers)
        scale[torch.as_tensor(places)] = numbers
        tensors[name].mul_(scale.reshape(-1, *([1] * (tensors[name].dim() - 1))))

    for name, places in channels.columns.items():
        kernel, groups = tensors[name], int(getattr(owner_of(model, name), "groups", 1))
        divisors = torch.ones(kernel.shape[1] * groups).to(factors)
        divisors[torch.from_numpy(places.reshape(-1))] = factors.repeat_interleave(places.shape[1])
        blocks = kernel.view(groups, -1, *kernel.shape[1:])
        blocks.div_(divisors.reshape(groups, 1, -1, *([1] * (kernel.dim() - 2))))
    for name, rows in channels.rows.items():
        layer = name.rpartition(".")[0]
        depthwise = is_depthwise(owner_of(model, name))
        if layer in batch_norms and depthwise:
            multiply(name, rows, 1 / factors)
        elif layer not in batch_norms and not depthwise:
            multiply(name, rows, factors)
    for name, places in channels.vectors.items():
        layer, _, leaf = name.rpartition(".")
        module = model.get_submodule(layer)
        if is_batch_norm(module):
            _scale_batch_norm(tensors[name], leaf, module, places, factors, layer in batch_norms.values())
        elif f"{layer}.weight" in channels.rows and layer not in batch_norms and leaf == "bias":
            multiply(name, places, factors)


def _scale_batch_norm(
    tensor: Tensor, leaf: str, module: nn.Module, places: Collection[int], factors: Tensor, follows: bool
) -> None:
    """Scale one tensor of a batch norm; its inputs are scaled, too, unless it follows a kernel."""
    index = torch.as_tensor(places)
    if leaf in ("weight", "bias") or (leaf == "running_mean" and not follows):
        tensor[index] = tensor[index] * factors
    elif leaf == "running_var" and not follows:
        eps = float(getattr(module, "eps", 0.0))
        tensor[index] = (factors**2 * (tensor[index] + eps) - eps).clamp(min=0)


def random_orders(
    sets: Sequence[ChannelSet], chosen: Callable[[ChannelSet], bool], generator: Generator
) -> dict[int, Tensor]:
    """Draw a permutation of the channels of each chosen set, by its index.

    The blocks of a set, and those of its partner, change places in the same way; if the partner is not
    chosen, they stay.

    Args:
        sets: channel sets of one network.
        chosen: whether a set is permuted.
        generator: source of the permutations.
    """
    orders: dict[int, Tensor] = {}
    blocks: dict[int, Tensor] = {}
    for index, channels in enumerate(sets):
        if not chosen(channels):
            continue
        if channels.blocks == 1:
            orders[index] = torch.randperm(channels.size, generator=generator)
            continue
        partner, count = channels.partner, channels.blocks
        assert partner is not None
        if partner in blocks:
            blocks[index] = blocks[partner]
        elif chosen(sets[partner]):
            blocks[index] = torch.randperm(count, generator=generator)
        else:
            blocks[index] = torch.arange(count)
        length = channels.size // count
        parts = [block * length + torch.randperm(length, generator=generator) for block in blocks[index]]
        orders[index] = torch.cat(parts)
    return orders


@torch.no_grad()
def permute_channels(model: nn.Module, sets: Sequence[ChannelSet], orders: Mapping[int, Tensor]) -> None:
    """Permute channels in kernels, vectors and running statistics, in place.

    Args:
        model: the network.
        sets: its channel sets.
        orders: permutation [size] by the index of a set; see `random_orders`.
    """
    tensors = tensors_of(model)
    for index, order in orders.items():
        for name, places in sets[index].columns.items():
            groups = int(getattr(owner_of(model, name), "groups", 1))
            _permute_columns(tensors[name], places, order, groups)
    for index, order in orders.items():
        for name, places in (*sets[index].rows.items(), *sets[index].vectors.items()):
            tensor, old = tensors[name], torch.from_numpy(places)
            axis = channel_axis(tensor) if name in sets[index].vectors else 0
            new = tensor.index_select(axis, old[order].flatten().to(tensor.device))
            tensor.index_copy_(axis, old.flatten().to(tensor.device), new)


def channel_axis(vector: Tensor) -> int:
    """Return the only dimension of a vector parameter that is longer than 1."""
    return next((axis for axis, size in enumerate(vector.shape) if size > 1), 0)


def _permute_columns(
    kernel: Tensor, places: np.ndarray[tuple[int, ...], np.dtype[np.int64]], order: Tensor, groups: int
) -> None:
    """Permute input columns while the rows of a grouped convolution are still in their old order."""
    old = torch.arange(kernel.shape[1] * groups)
    old[torch.from_numpy(places.reshape(-1))] = torch.from_numpy(places[order.numpy()].reshape(-1))
    if groups == 1:
        kernel.copy_(kernel[:, old.to(kernel.device)])
        return
    width, rows = kernel.shape[1], kernel.shape[0] // groups
    for columns in old.split(width):
        block = int(columns[0]) // width
        part = kernel[block * rows : (block + 1) * rows]
        part.copy_(part[:, (columns - block * width).to(kernel.device)])
