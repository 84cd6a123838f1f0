"""Which batch norm belongs to which convolution, and which channels of a residual network may be scaled or
permuted together without changing its function.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mtlsign.errors import ModelError
from mtlsign.models.taps import tapped_layers


@dataclass(frozen=True)
class ChannelGroup:
    """One set of channels: everything that writes them and everything that reads them.

    Attributes:
        place: "inner" of a block, or the residual "stream" of a stage.
        size: how many.
        producers: (convolution, its batch norm), by module name.
        consumers: convolutions and linear layers whose input columns these channels are.
    """

    place: str
    size: int
    producers: tuple[tuple[str, str], ...]
    consumers: tuple[str, ...]


def find_channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """All channel sets of a torchvision ResNet of any width, in execution order.

    Raises:
        ModelError: another architecture (its graph is not known here).
    """
    if not isinstance(model, ResNet):
        raise ModelError(
            f"the channel sets of {type(model).__name__} are not known; only ResNets are supported",
            field="model",
        )
    modules = dict(model.named_modules())
    if any(m.groups != 1 for m in modules.values() if isinstance(m, nn.Conv2d)):
        raise ModelError("has grouped convolutions; only plain ones are supported", field="model")
    found: list[ChannelGroup] = []
    producers, consumers = [("conv1", "bn1")], []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(modules[stage].children()):
            assert isinstance(block, BasicBlock | Bottleneck)
            name = f"{stage}.{index}"
            convs = [n for n in ("conv1", "conv2", "conv3") if hasattr(block, n)]
            consumers.append(f"{name}.conv1")
            for first, second in itertools.pairwise(convs):
                inner = ((f"{name}.{first}", f"{name}.bn{first[-1]}"),)
                found.append(_channels(modules, "inner", inner, (f"{name}.{second}",)))
            last = (f"{name}.{convs[-1]}", f"{name}.bn{convs[-1][-1]}")
            if block.downsample is not None:  # the old stream ends here, a new one begins
                consumers.append(f"{name}.downsample.0")
                found.append(_channels(modules, "stream", tuple(producers), tuple(consumers)))
                producers, consumers = [(f"{name}.downsample.0", f"{name}.downsample.1")], []
            producers.append(last)
    return [*found, _channels(modules, "stream", tuple(producers), (*consumers, "fc"))]


def batch_norm_of_conv(model: nn.Module, sample: Tensor) -> dict[str, str]:
    """Return convolution -> the batch norm that takes its output unchanged, over the whole network.

    Args:
        model: any network.
        sample: float32 [1, C, H, W], an input that the network accepts.
    """
    last = [n for n, m in model.named_modules() if n and not list(m.children())]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    end = linear[-1] if linear else last[-1]
    return {layer.conv: layer.bn for layer in tapped_layers(model, (end,), sample) if layer.bn is not None}


def _channels(
    modules: Mapping[str, nn.Module],
    place: str,
    producers: tuple[tuple[str, str], ...],
    consumers: tuple[str, ...],
) -> ChannelGroup:
    first = modules[producers[0][0]]
    assert isinstance(first, nn.Conv2d)
    return ChannelGroup(place, first.out_channels, producers, consumers)


@torch.no_grad()
def scale_channels(model: nn.Module, channels: ChannelGroup, factors: Tensor) -> None:
    """Channels times `factors` > 0 [size] where they are written, divided out where they are read."""
    modules = dict(model.named_modules())
    for conv, norm in channels.producers:
        target = modules[norm] if isinstance(modules[norm], _BatchNorm) else modules[conv]
        for tensor in (target.weight, target.bias):
            if isinstance(tensor, Tensor):
                tensor.mul_(factors.reshape(-1, *([1] * (tensor.dim() - 1))))
    for name in channels.consumers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight.div_(factors.reshape(1, -1, *([1] * (weight.dim() - 2))))


@torch.no_grad()
def permute_channels(model: nn.Module, channels: ChannelGroup, order: Tensor) -> None:
    """Channels in another order (int64 [size]) everywhere: kernels, norms and their running statistics."""
    modules = dict(model.named_modules())
    for conv, norm in channels.producers:
        for module in (modules[conv], modules[norm]):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dim():  # not num_batches_tracked
                    tensor.copy_(tensor[order].clone())
    for name in channels.consumers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight[:, order].clone())
