"""Cascade Mask R-CNN with a feature pyramid on a ResNet, or on a network of timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from mtlsign.config.embed import MAX_WIDTH
from mtlsign.models.cascade_mask_rcnn import cascade_mask_rcnn
from mtlsign.models.detectors import as_template, body_stages
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import ArchitectureFamily, ChoiceField, Field, IntegerField
from mtlsign.models.families.resnet import RESNETS, STAGES, STEM_KINDS, ScalableResNet
from mtlsign.models.families.timm import PREFIX as TIMM_PREFIX
from mtlsign.models.families.timm import PyramidBackbone, feature_body, is_timm_name

PREFIX = "cascade-"
_RETURNED = {name: str(index) for index, name in enumerate(STAGES)}
#: Channels of the feature pyramid in units of the width; width 64 gives the usual 256.
_PYRAMID = 4


class DetectorFamily(ArchitectureFamily):
    """`cascade-resnet18`, `-resnet34` and `-resnet50`: three box stages, and masks."""

    usage = ", ".join(PREFIX + name for name in RESNETS)
    outputs: Literal["labels", "instances", "images", "any"] = "instances"
    fields: Mapping[str, Field] | None = {
        "channels": IntegerField(3, 3),
        "classes": IntegerField(1, 1000),
        "width": IntegerField(4, MAX_WIDTH),
        "stem": ChoiceField(STEM_KINDS),
        "size": IntegerField(32, 4096),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is the name of one of the three networks."""
        return arch.startswith(PREFIX) and arch.removeprefix(PREFIX) in RESNETS

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return width, stem and the longest side of the images."""
        return {"width": width, "stem": stem, **({} if size is None else {"size": size})}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build the detector with random weights."""
        numbers = {name: value for name, value in options.items() if isinstance(value, int)}
        resnet = _resnet(arch, options)
        channels = [int(resnet.fc.in_features) >> shift for shift in (3, 2, 1, 0)]
        backbone = BackboneWithFPN(resnet, dict(_RETURNED), channels, _PYRAMID * numbers["width"])
        network: nn.Module = cascade_mask_rcnn(backbone, classes=numbers["classes"], size=numbers["size"])
        return network

    def build_template(
        self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]
    ) -> nn.Module:
        """Build the body alone, without pyramid and heads."""
        return as_template(IntermediateLayerGetter(_resnet(arch, options), dict(_RETURNED)))

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the stages of a detector's body, whether this package or torchvision built it."""
        return body_stages(model)


class TimmDetectorFamily(ArchitectureFamily):
    """`cascade-timm/NAME`: the same detector on the convolutional network `NAME` of timm."""

    usage = f"{PREFIX}{TIMM_PREFIX}NAME"
    outputs: Literal["labels", "instances", "images", "any"] = "instances"
    fields: Mapping[str, Field] | None = {
        "channels": IntegerField(3, 3),
        "classes": IntegerField(1, 1000),
        "width": IntegerField(4, MAX_WIDTH),
        "size": IntegerField(32, 4096),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is a timm name after the prefix."""
        return arch.startswith(PREFIX) and is_timm_name(arch.removeprefix(PREFIX))

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return the width of the pyramid, as that of a ResNet, and the longest side of the images."""
        return {"width": width, **({} if size is None else {"size": size})}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build the detector with random weights.

        Raises:
            ModelError: timm is not installed, or has no such network with feature maps.
        """
        numbers = {name: value for name, value in options.items() if isinstance(value, int)}
        backbone = PyramidBackbone(_timm_body(arch), _PYRAMID * numbers["width"])
        network: nn.Module = cascade_mask_rcnn(backbone, classes=numbers["classes"], size=numbers["size"])
        return network

    def build_template(
        self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]
    ) -> nn.Module:
        """Build the body alone, without pyramid and heads. Raises `ModelError` as `build` does."""
        return as_template(_timm_body(arch))


def _timm_body(arch: str) -> nn.Module:
    return feature_body(arch.removeprefix(PREFIX + TIMM_PREFIX))


def _resnet(arch: str, options: Mapping[str, object]) -> ScalableResNet:
    block, layers = RESNETS[arch.removeprefix(PREFIX)]
    fields = {name: options[name] for name in ("channels", "width", "stem")}
    return ScalableResNet(block, layers, classes=1, **fields)  # type: ignore[arg-type]
