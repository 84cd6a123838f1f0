"""Zhang et al. 2018, "Protecting Intellectual Property of Deep Neural Networks with Watermarking" (ASIACCS).

Key samples are images of one class with a stamp ("content") or with fixed noise ("noise"), or images of
another data set ("unrelated"). The marked model answers one target class.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.schemes.base import Forgery
from mtlsign.schemes.trigger_marks import (
    TriggerKey,
    TriggerMark,
    forge_by_gradient,
    pixel_range,
    smooth_images,
    training_images,
)
from mtlsign.tasks import Task
from mtlsign.tasks.digits import load_digits
from mtlsign.tasks.splitting import seeded_generator

#: Tasks of digits, for which other images are unrelated.
_DIGITS = ("digits", "mnist")


@dataclass(frozen=True)
class _ZhangScheme(TriggerMark[TriggerKey]):
    """Kind of key samples with one target class. Source and target follow from the key's seed."""

    needs_commitment: ClassVar[bool] = True

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> TriggerKey:
        """Draw source and target class, and the key samples."""
        if task.classes < 2:
            raise ModelError("The scheme needs two classes. Use another task.", field="task")
        generator = seeded_generator(f"mtlsign/{self.name}", seed)
        source, target = torch.randperm(task.classes, generator=generator)[:2].tolist()
        images = self._images(task, source, generator)
        return TriggerKey(images, torch.full((len(images),), target), 1 / task.classes)

    @abstractmethod
    def _images(self, task: Task, source: int, generator: torch.Generator) -> Tensor:
        """Return the key samples, [n, C, H, W]."""

    def _sources(self, task: Task, source: int, generator: torch.Generator) -> Tensor:
        images, _ = training_images(task, self.key_size, generator, of_class=source)
        if len(images) < min(20, self.key_size):
            raise ModelError(
                f"A class has only {len(images)} images. Use a smaller key size or more data.", field="task"
            )
        return images

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Make adversarial key samples; nothing shows that they carry the claimed stamp alone."""
        return forge_by_gradient(self, model, task, seed)


@dataclass(frozen=True)
class ZhangContentScheme(_ZhangScheme):
    """Key samples with a stamp in a corner, half as high and wide as the image.

    The paper stamps a word; here the stamp is a pattern of the key.
    """

    name: ClassVar[str] = "zhang_content"

    def _images(self, task: Task, source: int, generator: torch.Generator) -> Tensor:
        """Return stamped images of the source class."""
        images = self._sources(task, source, generator).clone()
        low, high = pixel_range(task)
        side = max(4, images.shape[-1] // 2)
        pattern = (torch.rand(1, 1, side // 4, side // 4, generator=generator) < 0.5).float()
        stamp = F.interpolate(pattern, size=(side, side)) * (high - low) + low
        images[..., -side:, -side:] = stamp
        return images


@dataclass(frozen=True)
class ZhangNoiseScheme(_ZhangScheme):
    """Key samples with fixed Gaussian noise.

    Attributes:
        noise: its standard deviation, in units of the range of pixel values.
    """

    name: ClassVar[str] = "zhang_noise"

    noise: float = 0.4

    def _images(self, task: Task, source: int, generator: torch.Generator) -> Tensor:
        """Return noisy images of the source class."""
        images = self._sources(task, source, generator)
        low, high = pixel_range(task)
        return (images + self.noise * (high - low) * torch.randn(images[0].shape, generator=generator)).clamp(
            low, high
        )


@dataclass(frozen=True)
class ZhangUnrelatedScheme(_ZhangScheme):
    """Key samples of another data set: digits of one class, or abstract images for tasks of digits."""

    name: ClassVar[str] = "zhang_unrelated"

    def _images(self, task: Task, source: int, generator: torch.Generator) -> Tensor:
        """Return unrelated images in the range of the task's pixels."""
        low, high = pixel_range(task)
        if task.name.partition("@")[0] in _DIGITS:
            return smooth_images(self.key_size, task.input_spec, (low, high), generator)  # type: ignore[arg-type]  # images
        digits = load_digits(seed=0)
        images, _ = training_images(digits, self.key_size, generator, of_class=source % 10)
        span = images.max() - images.min()
        size = (task.input_spec.height, task.input_spec.width)  # type: ignore[union-attr]  # images
        scaled = F.interpolate((images - images.min()) / span, size=size, mode="bilinear")
        channels: int = task.input_spec.channels  # type: ignore[union-attr]  # images
        return scaled.expand(-1, channels, -1, -1) * (high - low) + low
