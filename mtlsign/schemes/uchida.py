"""Uchida et al. 2017, "Embedding Watermarks into Deep Neural Networks" (arXiv 1701.04082).

Bits are signs of a secret random projection of one convolution's weight, averaged over its filters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.schemes.base import Detection, Forgery
from mtlsign.schemes.comparator import bits_from_seed
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.weight_marks import (
    WeightKey,
    WeightMark,
    flipped_projection,
    mean_filter,
    middle_layer,
    weight_layers,
    weight_of,
)
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


@dataclass(frozen=True)
class UchidaScheme(WeightMark[WeightKey]):
    """Scheme of Uchida et al., with the "random" key.

    Attributes:
        strength: weight of the sum over all bits' cross-entropies, lambda of the paper.
    """

    name: ClassVar[str] = "uchida"
    needs_commitment: ClassVar[bool] = True

    strength: float = 0.01

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> WeightKey:
        """Draw a standard normal projection and bits for a layer with two values for each bit."""
        layer = middle_layer(model, lambda weight: weight[0].numel(), 2 * self.key_size, "inputs of a filter")
        weight = weight_layers(model)[layer]
        generator = seeded_generator("mtlsign/uchida", seed)
        projection = torch.randn(weight[0].numel(), self.key_size, generator=generator)
        bits = bits_from_seed("mtlsign/uchida/bits", seed, self.key_size)
        return WeightKey(layer, tuple(weight.shape), projection, bits)

    def scores(self, model: nn.Module, key: WeightKey) -> Tensor:
        """Return the projections of the mean filter, [n]."""
        values = mean_filter(weight_of(model, key.layer, key.shape))
        return values @ key.projection.to(values)

    def term(self, model: nn.Module, key: WeightKey, step: int) -> Tensor:
        """Return lambda times the sum of the bits' losses."""
        return self.strength * len(key.labels) * super().term(model, key, step)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Negate the columns of the projection that disagree with the model."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            with torch.no_grad():
                scores = self.scores(model, key)
            fitted = replace(key, projection=flipped_projection(key.projection, scores.cpu(), key.bits))
            return self.verify(model, fitted)

        return computed_key("columns of the projection negated", detect)
