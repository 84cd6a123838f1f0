"""RIGA, Wang and Kerschbaum 2021 (arXiv 1910.14268): a trained extractor reads bits from one layer's weights.

A second network learns to separate marked from unmarked weights, and the embedding misleads it, so that the
distribution of the weights stays inconspicuous. For the base weights the extractor learns random bits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.schemes.base import Detection, Forgery, SchemeSettings
from mtlsign.schemes.comparator import bits_from_seed
from mtlsign.schemes.extractors import fit_to_bits, seeded_network
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import Optimizer
from mtlsign.schemes.weight_marks import (
    WeightKey,
    WeightMark,
    mean_filter,
    middle_layer,
    weight_layers,
    weight_of,
)
from mtlsign.tasks import Task

#: Hidden units of the extractor and of the discriminator.
_HIDDEN = 100
#: Largest size of the discriminator's weights, as in a Wasserstein GAN.
_CLIP = 0.01


@dataclass(frozen=True)
class RigaKey(WeightKey):
    """Key with trained networks.

    Attributes:
        extractor: mean filter -> n scores; trained by the embedding, in place.
        discriminator: sorted mean filter -> one score; trained by the embedding, in place.
        base: mean filter of the unmarked model.
        decoy: random bits that the extractor learns for it.
    """

    extractor: nn.Sequential = field(default_factory=nn.Sequential, repr=False)
    discriminator: nn.Sequential = field(default_factory=nn.Sequential, repr=False)
    base: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    decoy: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class RigaScheme(WeightMark[RigaKey]):
    """Scheme of Wang and Kerschbaum.

    Attributes:
        strength: weight of the extractor's two losses, lambda 1 of the paper. With its value 0.01 and a rate
            of 1e-4, 400 steps leave the weights where they are: the extractor then reads the bits from
            the unmarked model as well.
        covertness: weight of the discriminator's loss, lambda 2 of the paper.
        lr: learning rate of Adam for the model.
        extractor_lr: learning rate of Adam for the extractor.
    """

    name: ClassVar[str] = "riga"
    needs_commitment: ClassVar[bool] = True

    strength: float = 1.0
    covertness: float = 0.1
    lr: float = 1e-3
    extractor_lr: float = 1e-3

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> RigaKey:
        """Initialise extractor and discriminator, and draw bits and decoy bits."""
        layer = middle_layer(model, lambda weight: weight[0].numel(), 2 * _HIDDEN, "inputs of a filter")
        weight = weight_layers(model)[layer]
        count = weight[0].numel()
        extractor = seeded_network(
            "mtlsign/riga/extractor", seed,
            lambda: nn.Sequential(nn.Linear(count, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, self.key_size)),
        )  # fmt: skip
        discriminator = seeded_network(
            "mtlsign/riga/discriminator", seed,
            lambda: nn.Sequential(nn.Linear(count, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1)),
        )  # fmt: skip
        bits = bits_from_seed("mtlsign/riga/bits", seed, self.key_size)
        decoy = bits_from_seed("mtlsign/riga/decoy", seed, self.key_size)
        base = mean_filter(weight).detach().clone()
        return RigaKey(
            layer, tuple(weight.shape), torch.empty(0), bits, extractor, discriminator, base, decoy
        )

    def scores(self, model: nn.Module, key: RigaKey) -> Tensor:
        """Return the extractor's scores for the mean filter, [n]."""
        values = mean_filter(weight_of(model, key.layer, key.shape))
        scores: Tensor = key.extractor.to(values.device)(values)
        return scores

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return Adam with the rates of the scheme."""
        return Optimizer("adam", self.lr, 0.0, self.extractor_lr)

    def extra_parameters(self, key: RigaKey) -> list[Tensor]:
        """Return the weights of the extractor."""
        return list(key.extractor.parameters())

    def term(self, model: nn.Module, key: RigaKey, step: int) -> Tensor:
        """Train the discriminator by one step; return the losses of extractor and generator."""
        values = mean_filter(weight_of(model, key.layer, key.shape))
        discriminator, base = key.discriminator.to(values.device), key.base.to(values)
        ones, zeros = torch.ones(1).to(values), torch.zeros(1).to(values)
        loss = F.binary_cross_entropy_with_logits
        separation = loss(discriminator(base.sort().values), ones) + loss(
            discriminator(values.detach().sort().values), zeros
        )
        gradients = torch.autograd.grad(separation, list(discriminator.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(discriminator.parameters(), gradients, strict=True):
                parameter.sub_(1e-3 * gradient).clamp_(-_CLIP, _CLIP)
        generator = loss(discriminator(values.sort().values), ones)
        bits, decoy = key.labels.to(values), key.decoy.to(values)
        reading = self.bit_loss(key.extractor.to(values.device)(values), bits)
        return self.strength * (reading + self.bit_loss(key.extractor(base), decoy)) + (
            self.covertness * generator
        )

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Train an extractor on the stolen weights."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            fitted = replace(key, extractor=copy.deepcopy(key.extractor))
            fit_to_bits(fitted.extractor, key.base, key.bits)
            return self.verify(model, fitted)

        return computed_key("extractor trained on the model's weights", detect)
