"""Descriptions of the inputs and outputs that a network is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSpec:
    """Images of a primary task and the number of its classes.

    Attributes:
        channels: image channels.
        height: image height in pixels.
        width: image width in pixels.
        classes: outputs of the network.
        outputs: labels of a whole image (or of its pixels), or the instances of objects in it.
    """

    channels: int
    height: int
    width: int
    classes: int
    outputs: Literal["labels", "instances"] = "labels"
    kind: ClassVar[Literal["image"]] = "image"

    @property
    def elements(self) -> int:
        """Numbers in one input."""
        return self.channels * self.height * self.width

    @property
    def architecture_fields(self) -> dict[str, int]:
        """Fields of an architecture that follow from the inputs and classes."""
        return {"channels": self.channels, "classes": self.classes}

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """Return inputs of this shape, all zeros: float32 [count, C, H, W]."""
        return torch.zeros(count, self.channels, self.height, self.width, device=device)

    def __str__(self) -> str:
        """Return the words of messages, such as "images of 3x32x32"."""
        return f"images of {self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TextSpec:
    """Sequences of token ids of a primary task and the number of its classes.

    Attributes:
        vocabulary: number of token ids; 0 is padding after the last token.
        embedding: numbers of one token's vector; None if only the user's network knows them.
        length: tokens of the longest sequence.
        classes: outputs of the network.
        outputs: whether a text has these outputs, or each of its tokens.
    """

    vocabulary: int
    embedding: int | None
    length: int
    classes: int
    outputs: Literal["text", "tokens"] = "text"
    kind: ClassVar[Literal["text"]] = "text"

    @property
    def elements(self) -> int:
        """Numbers in one input after the embedding."""
        return self.length * (self.embedding or 1)

    @property
    def architecture_fields(self) -> dict[str, int]:
        """Fields of an architecture that follow from the inputs and classes."""
        fields = {"vocabulary": self.vocabulary, "embedding": self.embedding, "classes": self.classes}
        return {name: value for name, value in fields.items() if value is not None}

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """Return sequences of this length without padding: int64 [count, L]."""
        return torch.ones(count, self.length, dtype=torch.int64, device=device)

    def __str__(self) -> str:
        """Return the words of messages, such as "texts of 56 tokens"."""
        return f"texts of {self.length} tokens"


@dataclass(frozen=True)
class LatentSpec:
    """Random vectors from which a generator makes images.

    Attributes:
        length: numbers of one vector.
        channels: channels of the generated images.
        height: their height in pixels.
        width: their width in pixels.
        outputs: whole images.
    """

    length: int
    channels: int
    height: int
    width: int
    outputs: Literal["images"] = "images"
    kind: ClassVar[Literal["latent"]] = "latent"

    @property
    def classes(self) -> int:
        """Outputs of the network: the values of one image."""
        return self.channels * self.height * self.width

    @property
    def elements(self) -> int:
        """Numbers in one input."""
        return self.length

    @property
    def architecture_fields(self) -> dict[str, int]:
        """Fields of an architecture that follow from inputs and outputs."""
        return {"channels": self.channels, "classes": self.classes}

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """Return vectors of zeros: float32 [count, length]."""
        return torch.zeros(count, self.length, device=device)

    def __str__(self) -> str:
        """Return the words of messages, such as "random vectors of 64 numbers"."""
        return f"random vectors of {self.length} numbers"


InputSpec = ImageSpec | TextSpec | LatentSpec
