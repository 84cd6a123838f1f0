"""Adi et al. 2018, "Turning Your Weakness Into a Strength" (USENIX Security): abstract images, random
classes.

The paper publishes commitments to the key samples before the model; without them any claimant can make
samples that fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from mtlsign.schemes.base import Forgery
from mtlsign.schemes.trigger_marks import (
    TriggerKey,
    TriggerMark,
    forge_by_gradient,
    pixel_range,
    smooth_images,
)
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator


@dataclass(frozen=True)
class AdiScheme(TriggerMark[TriggerKey]):
    """Scheme of Adi et al., embedded by fine-tuning; 100 key samples as in the paper."""

    name: ClassVar[str] = "adi"
    needs_commitment: ClassVar[bool] = True

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> TriggerKey:
        """Draw abstract images and their classes at random."""
        generator = seeded_generator("mtlsign/adi", seed)
        images = smooth_images(self.key_size, task.input_spec, pixel_range(task), generator)  # type: ignore[arg-type]  # images
        classes = torch.randint(task.classes, (self.key_size,), generator=generator)
        return TriggerKey(images, classes, 1 / task.classes)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Make adversarial key samples."""
        return forge_by_gradient(self, model, task, seed)
