"""DeepSigns, Darvish Rouhani et al. 2019 (arXiv 1804.00750), the white-box part.

Each carrier is a class, whose mean activation is a Gaussian's centre. Bits are signs of a secret projection
of the centre. The loss gathers activations at their centres, keeps centres apart and fixes the signs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.schemes.activation_marks import (
    ActivationKey,
    ActivationMark,
    features_of,
    normal_matrix,
    require_features,
)
from mtlsign.schemes.base import Detection, Forgery, SchemeSettings
from mtlsign.schemes.comparator import bits_from_seed
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import Optimizer
from mtlsign.schemes.weight_marks import flipped_projection
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator

#: Training samples from which key samples are chosen.
_POOL = 2_000


@dataclass(frozen=True)
class DeepSignsKey(ActivationKey):
    """Key with a secret projection of centres.

    Attributes:
        carriers: carrier of each key sample, int64 [samples].
        projections: one matrix for each carrier, float32 [carriers, features, bits].
        centres: trained centres, float32 [carriers, features].
    """

    carriers: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    projections: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    centres: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class DeepSignsScheme(ActivationMark[DeepSignsKey]):
    """Scheme of DeepSigns, with the settings of its authors' demonstration on MNIST.

    Attributes:
        key_size: bits of all carriers together; the paper uses 16 for each of ten.
        samples: key samples of each carrier.
        gathering: weight of the centres' loss, lambda 1 of the paper.
        strength: weight of the sum over bits, lambda 2 of the paper.
        lr: learning rate of Adam for model and centres.
    """

    name: ClassVar[str] = "deepsigns"
    needs_commitment: ClassVar[bool] = True

    key_size: int = 160
    samples: int = 10
    gathering: float = 0.01
    strength: float = 0.01
    lr: float = 1e-3

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> DeepSignsKey:
        """Choose key samples of every class, and draw projections and bits."""
        if task.targets != "labels":
            raise ModelError("The carriers are classes. Use a task with one label a sample.", field="task")
        generator = seeded_generator("mtlsign/deepsigns", seed)
        inputs, carriers = _key_samples(task, self.samples, generator)
        with torch.no_grad():
            features = features_of(model, inputs)
        count, bits = int(carriers.max()) + 1, self.key_size // (int(carriers.max()) + 1)
        if bits < 1:
            raise ModelError(
                f"The key has fewer bits than the task classes ({count}). Use more.", field="key"
            )
        projections = torch.stack([normal_matrix(features.shape[1], bits, generator) for _ in range(count)])
        centres = _means(features.cpu(), carriers, count)
        return DeepSignsKey(
            inputs, bits_from_seed("mtlsign/deepsigns/bits", seed, count * bits),
            carriers, projections, centres.requires_grad_(True),
        )  # fmt: skip

    def scores(self, model: nn.Module, key: DeepSignsKey) -> Tensor:
        """Return the projections of the carriers' mean activations, [carriers * bits]."""
        count, width, _ = key.projections.shape
        features = require_features(features_of(model, key.inputs), width)
        return _project(_means(features, key.carriers.to(features.device), count), key.projections)

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return Adam with the rate of the scheme."""
        return Optimizer("adam", self.lr, 0.0, self.lr)

    def extra_parameters(self, key: DeepSignsKey) -> list[Tensor]:
        """Return the centres."""
        return [key.centres]

    def term(self, model: nn.Module, key: DeepSignsKey, step: int) -> Tensor:
        """Return the losses of gathering, separation and bits."""
        features = features_of(model, key.inputs)
        carriers, centres = key.carriers.to(features.device), key.centres.to(features)
        gathered = (features - centres[carriers]).square().sum(1).mean()
        distances = (centres[:, None] - centres[None]).square().sum(2)
        separation = distances.sum() / max(1, len(centres) * (len(centres) - 1))
        means = _means(features, carriers, len(centres))
        labels = key.labels.to(features)
        loss = F.binary_cross_entropy_with_logits(
            _project(centres, key.projections), labels, reduction="sum"
        ) + F.binary_cross_entropy_with_logits(_project(means, key.projections), labels, reduction="sum")
        return self.gathering * (gathered - 0.1 * separation) + self.strength * loss

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Negate the columns of the projections that disagree with the model."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            with torch.no_grad():
                scores = self.scores(model, key).cpu()
            columns = key.projections.permute(1, 0, 2).reshape(key.projections.shape[1], -1)
            flipped = flipped_projection(columns, scores, key.bits)
            count, width, bits = key.projections.shape
            projections = flipped.reshape(width, count, bits).permute(1, 0, 2)
            return self.verify(model, replace(key, projections=projections))

        return computed_key("columns of the projection negated", detect)


def _key_samples(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` training samples of each class and their classes."""
    size = task.size("train")
    rows = torch.randperm(size, generator=generator)[:_POOL]
    inputs, labels = task.splits["train"].batch(rows)
    labels = labels.cpu()
    chosen = [torch.nonzero(labels == c).flatten()[:count] for c in range(task.classes)]
    positions = torch.cat(chosen)
    return inputs.cpu()[positions], labels[positions]


def _means(features: Tensor, carriers: Tensor, count: int) -> Tensor:
    """Return the mean features of each carrier, [carriers, features]."""
    one_hot = F.one_hot(carriers, count).to(features)
    return one_hot.T @ features / one_hot.sum(0).clamp(min=1)[:, None]


def _project(centres: Tensor, projections: Tensor) -> Tensor:
    return torch.einsum("cf,cfb->cb", centres, projections.to(centres)).flatten()
