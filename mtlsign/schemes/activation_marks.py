"""Parts that schemes with bits in activations share: features before the last layer, and their keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.taps import last_layer
from mtlsign.schemes.base import Access
from mtlsign.schemes.comparator import BitsKey, Comparator, K
from mtlsign.schemes.training import evaluation_mode


@dataclass(frozen=True)
class ActivationKey(BitsKey):
    """Key of a scheme that reads activations.

    Attributes:
        inputs: key samples, [samples, ...].
        bits: the watermark, float32 [n].
    """

    inputs: Tensor = field(repr=False)
    bits: Tensor = field(repr=False)

    @property
    def sample_count(self) -> int:
        """Number of key samples."""
        return len(self.inputs)


@dataclass(frozen=True)
class ActivationMark(Comparator[K]):
    """Scheme that runs the model on key samples and reads the inputs of its last linear layer."""

    access: ClassVar[Access] = "white-box"


class _FeaturesReadError(BaseException):
    """End of a forward pass before the last layer. Not an `Exception`, so that no model catches it."""


def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs of the last linear layer, with gradients and running statistics: [samples, features].

    Args:
        model: the suspect.
        inputs: key samples, on any device.

    Raises:
        ModelError: the last layer is not linear, is not reached, or the model does not accept the samples.
    """
    layer = model.get_submodule(last_layer(model))
    if not isinstance(layer, nn.Linear):
        raise ModelError("The last layer is not linear. Use a classifier.", field="model")
    features: list[Tensor] = []

    def read(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        features.append(arguments[0])
        raise _FeaturesReadError

    handle = layer.register_forward_pre_hook(read)
    try:
        with evaluation_mode(model):
            model(inputs.to(layer.weight.device))
    except _FeaturesReadError:
        return features[0].flatten(1)
    except RuntimeError as error:
        raise refused_samples(error) from None
    finally:
        handle.remove()
    raise ModelError("The model does not use its last linear layer. Use a classifier.", field="model")


def refused_samples(error: RuntimeError) -> ModelError:
    """Return the error of a model that cannot run on the key samples."""
    reason = " ".join(str(error).split())[:200]
    return ModelError(
        f"The model does not accept the key samples ({reason}). Pass a copy of the marked model.",
        field="model",
    )


def require_features(features: Tensor, count: int) -> Tensor:
    """Return the features if there are `count` of them, as the key expects; else raise `ModelError`."""
    if features.shape[1] != count:
        raise ModelError(
            f"The model has {features.shape[1]:,} features instead of {count:,}. Pass a copy of the marked "
            "model.",
            field="model",
        )
    return features


def normal_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers, float32 [rows, columns]."""
    return torch.randn(rows, columns, generator=generator)
