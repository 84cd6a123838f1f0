"""Generators of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from mtlsign.config.embed import MAX_WIDTH
from mtlsign.models.dcgan import DCGAN
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import CHANNELS, CLASSES, ArchitectureFamily, Field, IntegerField

NAME = "dcgan"


class GeneratorFamily(ArchitectureFamily):
    """`dcgan`, whose `classes` are the values of an image."""

    usage = NAME
    fields: Mapping[str, Field] | None = {
        "channels": CHANNELS,
        "classes": CLASSES,
        "width": IntegerField(4, MAX_WIDTH),
    }
    inputs: Literal["image", "text", "any"] = "image"
    outputs: Literal["labels", "instances", "images", "any"] = "images"

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is the name of the network."""
        return arch == NAME

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return the width."""
        return {"width": width}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build generator and discriminator."""
        return DCGAN(**options)  # type: ignore[arg-type]  # checked fields
