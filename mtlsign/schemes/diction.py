"""DICTION, Bellafqira and Coatrieux 2022 (arXiv 2210.15745): a trained projection of mean activations.

Key samples are Gaussian noise. A projection network reads the watermark from the mean activation of the
marked model, and random bits from that of the unmarked one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes.activation_marks import ActivationKey, ActivationMark, features_of, require_features
from mtlsign.schemes.base import Detection, Forgery, SchemeSettings
from mtlsign.schemes.comparator import bits_from_seed
from mtlsign.schemes.extractors import fit_to_bits, seeded_network
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import Optimizer
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


@dataclass(frozen=True)
class DictionKey(ActivationKey):
    """Key with a trained projection.

    Attributes:
        chosen: positions of the features that are read, int64.
        width: features of the base model.
        projection: mean activation -> n scores; trained by the embedding, in place.
        base: mean activation of the unmarked model.
        seed: seed of the decoy bits, which change from epoch to epoch.
    """

    chosen: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    width: int = 0
    projection: nn.Sequential = field(default_factory=nn.Sequential, repr=False)
    base: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    seed: int = 0


@dataclass(frozen=True)
class DictionScheme(ActivationMark[DictionKey]):
    """Scheme of DICTION.

    Attributes:
        strength: weight of the projection's two losses, lambda of the paper.
        share: share of the features that is read.
        samples: key samples.
        lr: learning rate of Adam for the model.
        projection_lr: learning rate of Adam for the projection.
        epoch_steps: steps after which the decoy bits change.
    """

    name: ClassVar[str] = "diction"
    needs_commitment: ClassVar[bool] = True

    strength: float = 1.0
    share: float = 0.5
    samples: int = 64
    lr: float = 1e-4
    projection_lr: float = 1e-2
    epoch_steps: int = 50

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> DictionKey:
        """Draw noise images, features and bits, and initialise the projection."""
        if not isinstance(task.input_spec, ImageSpec):
            raise ModelError(f"Key samples are images, and the task has {task.input_spec}.", field="task")
        generator = seeded_generator("mtlsign/diction", seed)
        inputs = torch.randn(self.samples, *task.input_spec.sample(1).shape[1:], generator=generator)
        with torch.no_grad():
            features = features_of(model, inputs).cpu()
        width = features.shape[1]
        chosen = torch.randperm(width, generator=generator)[: max(1, round(self.share * width))]
        projection = seeded_network(
            "mtlsign/diction/projection", seed, lambda: nn.Sequential(nn.Linear(len(chosen), self.key_size))
        )
        bits = bits_from_seed("mtlsign/diction/bits", seed, self.key_size)
        return DictionKey(inputs, bits, chosen, width, projection, features.mean(0)[chosen].clone(), seed)

    def scores(self, model: nn.Module, key: DictionKey) -> Tensor:
        """Return the projection's scores for the mean activation, [n]."""
        features = require_features(features_of(model, key.inputs), key.width)
        mean = features.mean(0)[key.chosen.to(features.device)]
        scores: Tensor = key.projection.to(features.device)(mean)
        return scores

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return Adam with the rates of the scheme."""
        return Optimizer("adam", self.lr, 0.0, self.projection_lr)

    def extra_parameters(self, key: DictionKey) -> list[Tensor]:
        """Return the weights of the projection."""
        return list(key.projection.parameters())

    def term(self, model: nn.Module, key: DictionKey, step: int) -> Tensor:
        """Return the losses of the watermark and of the decoy bits."""
        scores = self.scores(model, key)
        epoch = step // self.epoch_steps
        decoy = bits_from_seed("mtlsign/diction/decoy", key.seed * 1_000_003 + epoch, len(key.bits))
        base = key.projection(key.base.to(scores))
        return self.strength * (
            self.bit_loss(scores, key.labels) + self.bit_loss(base, decoy.to(scores.device))
        )

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Train a projection on the stolen activations."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            fitted = replace(key, projection=copy.deepcopy(key.projection))
            fit_to_bits(fitted.projection, key.base, key.bits)
            return self.verify(model, fitted)

        return computed_key("projection trained on the model's activations", detect)
