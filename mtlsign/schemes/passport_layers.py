"""Passport layers: convolutions before a batch norm, and passports made from their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.schemes.training import evaluation_mode


@dataclass(frozen=True)
class PassportLayer:
    """Convolution whose batch norm takes scale and shift from passports.

    Attributes:
        convolution: name of an ungrouped `nn.Conv2d`.
        norm: name of the `nn.BatchNorm2d` that it feeds.
        shape: shape of the weight.
    """

    convolution: str
    norm: str
    shape: tuple[int, ...]

    def response(self, model: nn.Module, passport: Tensor) -> Tensor:
        """Return the spatial means of the convolution of a passport, with gradients: [out].

        Args:
            model: the suspect.
            passport: [1, in, H, W].

        Raises:
            ModelError: the model lacks the layer or its batch norm, or has others in their place.
        """
        layers = dict(model.named_modules())
        layer, norm = layers.get(self.convolution), layers.get(self.norm)
        if (
            not isinstance(layer, nn.Conv2d)
            or tuple(layer.weight.shape) != self.shape
            or not isinstance(norm, nn.BatchNorm2d)
            or norm.weight is None
        ):
            raise ModelError(
                f"The model has no convolution {self.convolution!r} of the shape {list(self.shape)} with the "
                f"batch norm {self.norm!r}. Pass a copy of the marked model.",
                field="model",
            )
        weight = layer.weight
        outputs = F.conv2d(
            passport.to(weight), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return outputs.mean((0, 2, 3))


@torch.no_grad()
def passport_layers(model: nn.Module, sample: Tensor, bits: int) -> tuple[PassportLayer, ...]:
    """Return the last layers that together have a channel for each bit, from the last one backwards.

    Args:
        model: the network; unchanged.
        sample: inputs of the network, [samples, ...].
        bits: number of channels.

    Raises:
        ModelError: the network has too few convolutions with a batch norm behind them.
    """
    pairs = _pairs(model, sample)
    chosen: list[PassportLayer] = []
    for layer in reversed(pairs):
        if sum(one.shape[0] for one in chosen) >= bits:
            break
        chosen.append(layer)
    channels = sum(one.shape[0] for one in chosen)
    if channels < bits:
        raise ModelError(
            f"The scheme needs {bits:,} channels of convolutions with batch norms, and the network has "
            f"{channels:,}. Choose a smaller key size or a wider network.",
            field="model",
        )
    return tuple(chosen)


def _pairs(model: nn.Module, sample: Tensor) -> list[PassportLayer]:
    """Return all convolutions whose output enters a batch norm, in the order of the forward pass."""
    produced: list[tuple[str, Tensor]] = []
    pairs: list[PassportLayer] = []
    handles = []

    def remember(name: str) -> object:
        def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
            produced.append((name, output))

        return hook

    def match(name: str) -> object:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            source = next((layer for layer, output in produced if output is arguments[0]), None)
            if source is not None:
                shape = tuple(model.get_submodule(source).weight.shape)  # type: ignore[arg-type]
                pairs.append(PassportLayer(source, name, shape))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
            handles.append(module.register_forward_hook(remember(name)))  # type: ignore[arg-type]
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            handles.append(module.register_forward_pre_hook(match(name)))  # type: ignore[arg-type]
    try:
        with evaluation_mode(model):
            model(sample.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return pairs


@torch.no_grad()
def draw_passports(
    model: nn.Module, layers: Sequence[PassportLayer], images: Tensor, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Compose a passport for each layer: channels of the layer's inputs for several images, shuffled.

    Position i of a passport is a random channel of image i modulo their number; no channel of an image is
    used twice, as in `passport_selection` of the authors' code.

    Args:
        model: the unmarked network; unchanged.
        layers: passport layers.
        images: [images, C, H, W].
        generator: source of the choice.

    Returns:
        Passports, float32 [1, in, H, W] on the CPU, in the order of the layers.
    """
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(layer.convolution).register_forward_pre_hook(
            lambda module, arguments, name=layer.convolution: inputs.__setitem__(name, arguments[0].cpu())
        )
        for layer in layers
    ]
    try:
        with evaluation_mode(model):
            model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_shuffled(inputs[layer.convolution].float(), generator) for layer in layers)


def _shuffled(activations: Tensor, generator: torch.Generator) -> Tensor:
    """Return one map for each channel position, [1, channels, H, W], from [images, channels, H, W]."""
    images, channels = activations.shape[:2]
    orders = [torch.randperm(channels, generator=generator) for _ in range(images)]
    maps = [activations[i % images, orders[i % images][i // images]] for i in range(channels)]
    return torch.stack(maps)[None].clone()
