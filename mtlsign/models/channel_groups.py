"""Channels that can be scaled or permuted together without changing the function of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.errors import ModelError
from mtlsign.models.families import FAMILIES
from mtlsign.models.families.base import ChannelGroup
from mtlsign.models.taps import last_layer, tapped_layers

__all__ = ["ChannelGroup", "batch_norm_of_conv", "find_channel_groups", "permute_channels", "scale_channels"]


def find_channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return all channel groups of a network in execution order.

    Raises:
        ModelError: no architecture family knows the channel groups of this network.
    """
    for family in FAMILIES:
        groups = family.channel_groups(model)
        if groups is not None:
            return groups
    raise ModelError(
        f"The channel groups of {type(model).__name__} are unknown. Use a ResNet.", field="model"
    )


def batch_norm_of_conv(model: nn.Module, sample: Tensor) -> dict[str, str]:
    """Return the batch norm that receives each convolution's unchanged output, by module name.

    Args:
        model: any network.
        sample: float32 [1, C, H, W], an input that the network accepts.
    """
    layers = tapped_layers(model, (last_layer(model),), sample)
    return {layer.conv: layer.batch_norm for layer in layers if layer.batch_norm is not None}


@torch.no_grad()
def scale_channels(model: nn.Module, group: ChannelGroup, factors: Tensor) -> None:
    """Multiply channels by `factors` > 0 [size] where they are written; divide where they are read."""
    modules = dict(model.named_modules())
    for conv, norm in group.producers:
        target = modules[norm] if isinstance(modules[norm], _BatchNorm) else modules[conv]
        for tensor in (target.weight, target.bias):
            if isinstance(tensor, Tensor):
                tensor.mul_(factors.reshape(-1, *([1] * (tensor.dim() - 1))))
    for name in group.consumers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight.div_(factors.reshape(1, -1, *([1] * (weight.dim() - 2))))


@torch.no_grad()
def permute_channels(model: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Permute channels (int64 [size]) in kernels, batch norms and running statistics."""
    modules = dict(model.named_modules())
    for conv, norm in group.producers:
        for module in (modules[conv], modules[norm]):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dim():  # the counter num_batches_tracked has no channels
                    tensor.copy_(tensor[order].clone())
    for name in group.consumers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight[:, order].clone())
