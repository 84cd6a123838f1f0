"""Parts that schemes with bits in one layer's weights share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.base import Access
from mtlsign.schemes.comparator import BitsKey, Comparator, K


@dataclass(frozen=True)
class WeightKey(BitsKey):
    """Key of a scheme that reads one layer's weight.

    Attributes:
        layer: name of the layer.
        shape: shape of its weight.
        projection: secret matrix, float32 [values, n].
        bits: the watermark, float32 [n].
    """

    layer: str
    shape: tuple[int, ...]
    projection: Tensor = field(repr=False)
    bits: Tensor = field(repr=False)

    @property
    def sample_count(self) -> int:
        """No inputs: the scheme reads weights alone."""
        return 0


@dataclass(frozen=True)
class WeightMark(Comparator[K]):
    """Scheme that reads the weights of a file and never runs the model."""

    access: ClassVar[Access] = "white-box"

    def suspect(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the tensors of the file as a network, if there is a file."""
        return model if tensors is None else FileView(tensors)


class FileView(nn.Module):
    """Network that consists of the tensors of a file; it can be read and not run."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = dict(tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the file by name."""
        return self._tensors


def weight_of(model: nn.Module, layer: str, shape: tuple[int, ...]) -> Tensor:
    """Return a layer's weight with gradients.

    Args:
        model: the suspect.
        layer: name of the layer.
        shape: shape of the weight in the base model.

    Raises:
        ModelError: the model has no such weight, or one of another shape.
    """
    name = f"{layer}.weight"
    tensors = model.tensors if isinstance(model, FileView) else dict(model.named_parameters())
    weight = tensors.get(name)
    if weight is None or not weight.is_floating_point():
        raise ModelError(f"The model has no weight {name!r}. Pass a copy of the marked model.", field="model")
    if tuple(weight.shape) != shape:
        raise ModelError(
            f"The weight {name!r} has the shape {list(weight.shape)} instead of {list(shape)}. "
            "Pass a copy of the marked model.",
            field="model",
        )
    return weight


def weight_layers(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ungrouped convolutions and of linear layers by layer, in order."""
    layers: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            layers[name] = module.weight
    return layers


def middle_layer(model: nn.Module, size_of: Callable[[Tensor], int], needed: int, unit: str) -> str:
    """Return the layer nearest to the middle of the network that is large enough.

    The first and the last layer are used only if no other is large enough.

    Args:
        model: the network.
        size_of: weight -> number of values that the scheme reads.
        needed: smallest number of values.
        unit: noun phrase for these values, for the message.

    Raises:
        ModelError: no layer is large enough.
    """
    layers = weight_layers(model)
    names = list(layers)
    middle = len(names) // 2
    inner = [name for name in names[1:-1] if size_of(layers[name]) >= needed]
    candidates = inner or [name for name in names if size_of(layers[name]) >= needed]
    if not candidates:
        largest = max((size_of(weight) for weight in layers.values()), default=0)
        raise ModelError(
            f"The scheme needs a layer of {needed:,} {unit}, and the largest has {largest:,}. "
            "Choose a smaller key size or a wider network.",
            field="model",
        )
    return min(candidates, key=lambda name: abs(names.index(name) - middle))


def mean_filter(weight: Tensor) -> Tensor:
    """Return the mean over output channels as a vector: [in * kernel]."""
    return weight.flatten(1).mean(0)


def flipped_projection(projection: Tensor, scores: Tensor, bits: Tensor) -> Tensor:
    """Return the projection with the columns negated whose scores disagree with the bits.

    Args:
        projection: [values, n].
        scores: scores of a model with it, [n].
        bits: [n] of 0 and 1.
    """
    agrees = (scores > 0) == (bits.to(scores) > 0)
    return projection * torch.where(agrees, 1.0, -1.0).to(projection)
