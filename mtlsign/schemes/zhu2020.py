"""Zhu et al. 2020, "Secure Neural Network Watermarking Protocol Against Forging Attack" (EURASIP JIVP).

Each key image is expanded from the hash of its predecessor, and its class is a second hash. Samples that fit
a given model can therefore only be searched for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes.base import Forgery
from mtlsign.schemes.forging import best_of_keys
from mtlsign.schemes.trigger_marks import TriggerKey, TriggerMark, pixel_range
from mtlsign.tasks import Task


@dataclass(frozen=True)
class ChainKey(TriggerKey):
    """Key samples of a hash chain.

    Attributes:
        first: bytes of the first image.
        span: smallest and largest pixel value.
        class_count: classes of the task.
    """

    first: bytes = field(default=b"", repr=False)
    span: tuple[float, float] = (0.0, 1.0)
    class_count: int = 1

    @property
    def is_chain(self) -> bool:
        """True if images and classes follow from the first image."""
        shape = tuple(self.inputs.shape[1:])
        images, classes = hash_chain(self.first, len(self.classes), shape, self.span, self.class_count)
        return bool(torch.equal(images, self.inputs) and torch.equal(classes, self.classes))


@dataclass(frozen=True)
class Zhu2020Scheme(TriggerMark[ChainKey]):
    """Scheme of Zhu et al.

    Attributes:
        in_batch: key samples in a batch; the paper trains 60 epochs with two of them in turn, and a short
            embedding needs more.
    """

    name: ClassVar[str] = "zhu2020"
    needs_commitment: ClassVar[bool] = False

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> ChainKey:
        """Hash a secret seed into the first image and follow the chain."""
        spec = task.input_spec
        assert isinstance(spec, ImageSpec)
        shape, span = (spec.channels, spec.height, spec.width), pixel_range(task)
        first = hashlib.shake_256(f"mtlsign/zhu2020 {seed}".encode()).digest(spec.elements)
        images, classes = hash_chain(first, self.key_size, shape, span, task.classes)
        return ChainKey(images, classes, 1 / task.classes, first, span, task.classes)

    def scores(self, model: nn.Module, key: ChainKey) -> Tensor:
        """Return the scores of the classes. Raises `ModelError` for samples that are no chain."""
        if not key.is_chain:
            raise ModelError("The key samples are no hash chain. Use the original key.", field="key")
        return super().scores(model, key)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Try chains."""
        return best_of_keys(
            lambda index: self.verify(model, self.draw_key(model, task, seed * 1_000_003 + index)),
            tries=self.forging_tries,
        )


def hash_chain(
    first: bytes, count: int, shape: tuple[int, ...], span: tuple[float, float], classes: int
) -> tuple[Tensor, Tensor]:
    """Return the images and classes of a chain.

    Args:
        first: bytes of the first image.
        count: number of images.
        shape: channels, height and width.
        span: smallest and largest pixel value.
        classes: classes of the task.

    Returns:
        Images, float32 [count, C, H, W], and classes, int64 [count].
    """
    current, images, labels = first, [], []
    for _ in range(count):
        pixels = torch.frombuffer(bytearray(current), dtype=torch.uint8).float() / 255
        images.append(pixels.reshape(shape) * (span[1] - span[0]) + span[0])
        digest = hashlib.sha256(b"class" + current).digest()
        labels.append(int.from_bytes(digest, "big") % classes)
        current = hashlib.shake_256(hashlib.sha256(b"image" + current).digest()).digest(len(first))
    return torch.stack(images), torch.tensor(labels)
