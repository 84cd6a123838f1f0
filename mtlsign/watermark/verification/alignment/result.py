"""Result of an alignment, and random sketches for comparison."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from mtlsign.watermark.keys.opening import keystream
from mtlsign.watermark.verification.alignment.assignment import Floats
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.sketches import projection_matrix

#: How much more alike W0 a descendant is than the same suspect is alike random kernels.
RECOGNITION_MARGIN = 0.1
#: Cosine from which a layer is recognised without a comparison with random kernels.
SURE_COSINE = 0.7
#: Standard deviations of this difference for unrelated kernels, from which recurrent layers are recognised.
_DEVIATIONS = 5.0
#: The same for a single layer: names are doubted only for one that is far from W0's.
_LAYER_DEVIATIONS = 1.0
#: The random kernels are public and the same for all owners.
_CONTROL_KEY = hashlib.sha256(b"mtlsign/v1/control-sketch").digest()


@dataclass(frozen=True)
class Alignment:
    """Kernels in W0's order.

    Attributes:
        kernels: float32 in W0's shapes, with the signs of W0's rows.
        similarity: mean cosine of the rows' sketches over all layers; 1 for W0.
        layer_similarities: mean cosine of the rows' sketches by name of the kernel; 0 for a kernel of zeros.
    """

    kernels: Mapping[str, Tensor]
    similarity: float
    layer_similarities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Descent:
    """Result of the comparison of an alignment with one for random kernels.

    Attributes:
        recognized: whether the suspect as a whole descends from W0.
        every_layer: whether each kernel is recognised as that of the layer whose name it has.
    """

    recognized: bool
    every_layer: bool


class Sketched(Protocol):
    """Layer of W0 with a sketch, a frozen dataclass."""

    @property
    def sketch(self) -> Floats:
        """Sketch of its rows, [rows, s]."""


_Layer = TypeVar("_Layer", bound=Sketched)


def with_random_sketches(layers: Mapping[str, _Layer]) -> dict[str, _Layer]:
    """Return layers with public random sketches, to which the same alignment gives a similarity by chance."""
    return {
        name: replace(layer, sketch=random_sketch(name, layer.sketch.shape))  # type: ignore[type-var]
        for name, layer in layers.items()
    }


def recognition_margin(sketches: Sequence[Floats], deviations: float = _DEVIATIONS) -> float:
    """Return the difference of two similarities from which recurrent layers are recognised.

    A cosine of s numbers has the variance 1/s for unrelated kernels, and a similarity is the mean over rows,
    then over layers. Small networks therefore need more than `RECOGNITION_MARGIN`.

    Args:
        sketches: of W0's layers, [rows, s].
        deviations: standard deviations of the difference for unrelated kernels.
    """
    variance = sum(1 / max(sketch.size, 1) for sketch in sketches) / max(len(sketches), 1) ** 2
    return max(RECOGNITION_MARGIN, deviations * math.sqrt(2 * variance))


def random_sketch(weight: str, shape: tuple[int, ...]) -> Floats:
    """Return a public random sketch of a layer.

    Args:
        weight: name of the kernel.
        shape: of the sketch, [rows, s].

    Returns:
        Rows of unit length.
    """
    rows, size = shape
    stream = keystream(_CONTROL_KEY, weight.encode(), 4 * rows * size)
    numbers = np.frombuffer(stream, dtype=">u4").astype(np.float64).reshape(rows, size)
    return unit_rows(numbers / 2**31 - 1)


def layer_similarities(layers: Mapping[str, _Layer], aligned: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean cosine of the rows' sketches of each layer that is present.

    Args:
        layers: W0's layers by name of the kernel.
        aligned: kernels in W0's order and coordinates.
    """
    means = {}
    for name, layer in layers.items():
        if name in aligned:
            kernel = aligned[name].double().flatten(1).numpy()
            projected = kernel @ projection_matrix(kernel.shape[1], layer.sketch.shape[1])
            means[name] = float((unit_rows(layer.sketch) * unit_rows(projected)).sum(1).mean())
    return means


def mean_similarity(similarities: Mapping[str, float]) -> float:
    """Return the mean similarity of the layers that are present; 0 without any."""
    return float(np.mean(list(similarities.values()))) if similarities else 0.0


class SketchComparison(ABC):
    """Recognition of descendants by an aligner of recurrent or attention layers."""

    @property
    @abstractmethod
    def compared_layers(self) -> Mapping[str, Sketched]:
        """W0's layers with a sketch, by name of the kernel."""

    @abstractmethod
    def align(self, kernels: Mapping[str, Tensor]) -> Alignment:
        """Bring a suspect's kernels into W0's order."""

    @abstractmethod
    def control(self) -> Self:
        """Return the same alignment with random sketches, which shows what search alone reaches."""

    def recognizes(self, kernels: Mapping[str, Tensor]) -> bool:
        """Return whether a suspect descends from W0, as far as its kernels show."""
        return self.descent(kernels, self.align(kernels)).recognized

    def descent(self, kernels: Mapping[str, Tensor], alignment: Alignment) -> Descent:
        """Compare an alignment with the same one for random sketches, as a whole and layer by layer.

        Args:
            kernels: of a suspect, by name.
            alignment: their alignment.
        """
        own, layers = alignment.layer_similarities, self.compared_layers
        if layers and all(own.get(name, 0.0) > SURE_COSINE for name in layers):
            return Descent(recognized=True, every_layer=True)
        chance = self.control().align(kernels).layer_similarities
        limits = {
            name: chance.get(name, 0.0) + recognition_margin([layer.sketch], _LAYER_DEVIATIONS)
            for name, layer in layers.items()
        }
        return Descent(
            recognized=self.exceeds(mean_similarity(own), mean_similarity(chance)),
            every_layer=all(own.get(n, 0.0) > min(SURE_COSINE, limit) for n, limit in limits.items()),
        )

    def exceeds(self, similarity: float, chance: float) -> bool:
        """Return whether a similarity shows descent, given the one that search reaches by chance."""
        sketches = [layer.sketch for layer in self.compared_layers.values()]
        return similarity > chance + recognition_margin(sketches)
