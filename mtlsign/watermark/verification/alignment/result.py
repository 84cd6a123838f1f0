"""Result of an alignment, and random sketches for comparison."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from mtlsign.watermark.keys.opening import keystream
from mtlsign.watermark.verification.alignment.assignment import Floats
from mtlsign.watermark.verification.alignment.layers import unit_rows
from mtlsign.watermark.verification.sketches import projection_matrix

#: How much more alike W0 a descendant is than the same suspect is alike random kernels.
RECOGNITION_MARGIN = 0.1
#: Standard deviations of this difference for unrelated kernels, from which recurrent layers are recognised.
_DEVIATIONS = 5.0
#: The same for a single layer: names are doubted only for one that is far from W0's.
_LAYER_DEVIATIONS = 1.0
#: Mean cosine from which a layer is W0's without a comparison.
_CLEAR = 0.8
#: The random kernels are public and the same for all owners.
_CONTROL_KEY = hashlib.sha256(b"mtlsign/v1/control-sketch").digest()


@dataclass(frozen=True)
class Alignment:
    """Kernels in W0's order.

    Attributes:
        kernels: float32 in W0's shapes, with the signs of W0's rows.
        similarity: mean cosine of the rows' sketches over all layers; 1 for W0.
    """

    kernels: Mapping[str, Tensor]
    similarity: float


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


def recognizes_each(
    sketches: Mapping[str, Floats], own: Mapping[str, float], chance: Callable[[], Mapping[str, float]]
) -> bool:
    """Return whether each layer with a sketch is more similar to W0's than by chance.

    Args:
        sketches: of W0's layers, [rows, s].
        own: name of a layer -> mean cosine.
        chance: returns the same with random sketches; not used if all layers are clearly similar.
    """
    if all(own.get(name, 0.0) > _CLEAR for name in sketches):
        return True
    by_chance = chance()
    return all(
        own.get(name, 0.0)
        > min(_CLEAR, by_chance.get(name, 0.0) + recognition_margin([sketch], _LAYER_DEVIATIONS))
        for name, sketch in sketches.items()
    )
