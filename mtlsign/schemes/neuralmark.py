"""NeuralMark 2025 (arXiv 2507.11137, AAAI 2026).

The watermark is a hash of the secret matrix, so that no claimant can choose both. It also chooses the weights
that carry it: in each filter round, those remain that stand at a 1 of the repeated watermark.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.schemes.base import Forgery
from mtlsign.schemes.forging import best_of_keys
from mtlsign.schemes.weight_marks import WeightKey, WeightMark, middle_layer, weight_layers, weight_of
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


@dataclass(frozen=True)
class NeuralMarkScheme(WeightMark[WeightKey]):
    """Scheme of NeuralMark.

    Attributes:
        rounds: filter rounds; each leaves about half of the weights.
        pooled: values after the average pooling, the rows of the secret matrix.
        strength: weight of the mean cross-entropy.
    """

    name: ClassVar[str] = "neuralmark"
    needs_commitment: ClassVar[bool] = False

    rounds: int = 4
    pooled: int = 512
    strength: float = 1.0

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> WeightKey:
        """Draw the secret matrix and hash it with SHAKE-256."""
        needed = int(1.25 * self.pooled * 2**self.rounds)
        layer = middle_layer(model, lambda weight: weight.numel(), needed, "weights")
        weight = weight_layers(model)[layer]
        generator = seeded_generator("mtlsign/neuralmark", seed)
        projection = torch.randn(self.pooled, self.key_size, generator=generator)
        return WeightKey(layer, tuple(weight.shape), projection, hashed_bits(projection))

    def scores(self, model: nn.Module, key: WeightKey) -> Tensor:
        """Return the products of the filtered and pooled weights with the matrix, [n]."""
        values = weight_of(model, key.layer, key.shape).flatten()
        chosen = key.bits.to(values.device) > 0
        for _ in range(self.rounds):
            repeats = len(values) // len(chosen)
            values = values[: repeats * len(chosen)][chosen.repeat(repeats)]
        rows = len(values) // self.pooled
        means = values[: rows * self.pooled].reshape(rows, self.pooled).mean(0)
        return means @ key.projection.to(means)

    def term(self, model: nn.Module, key: WeightKey, step: int) -> Tensor:
        """Return lambda times the mean cross-entropy."""
        return self.strength * super().term(model, key, step)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Try random matrices, because the watermark is a hash of the matrix."""
        return best_of_keys(
            lambda index: self.verify(model, self.generate_key(model, task, seed * 1_000_003 + index)),
            tries=self.forging_tries,
        )


def hashed_bits(projection: Tensor) -> Tensor:
    """Return the bits of SHAKE-256 over the matrix's float32 bytes, one for each column: float32 [n]."""
    count = projection.shape[1]
    digest = hashlib.shake_256(projection.numpy().tobytes()).digest((count + 7) // 8)
    bits = [digest[index // 8] >> (7 - index % 8) & 1 for index in range(count)]
    return torch.tensor(bits, dtype=torch.float32)
