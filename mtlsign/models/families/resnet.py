"""ResNets of any width, with torchvision's module names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mtlsign.config.embed import MAX_WIDTH
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import (
    CHANNELS,
    CLASSES,
    ArchitectureFamily,
    ChoiceField,
    Field,
    IntegerField,
    Translation,
)

RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
STEM_KINDS = ("stock", "cifar")
STAGES = ("layer1", "layer2", "layer3", "layer4")

_CONV = r"(convolution|normalization)"
#: Names of the transformers library, after any prefix.
_STEM = re.compile(rf"((?:.*\.)?)embedder\.embedder\.{_CONV}\.(\w+)")
_BLOCK = r"((?:.*\.)?)encoder\.stages\.([0-9])\.layers\.(0|[1-9][0-9]*)"
_INNER = re.compile(rf"{_BLOCK}\.layer\.([0-9])\.{_CONV}\.(\w+)")
_SHORTCUT = re.compile(rf"{_BLOCK}\.shortcut\.{_CONV}\.(\w+)")
_HEAD = re.compile(r"((?:.*\.)?)classifier\.1\.(\w+)")


class ScalableResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet with `width` times 1, 2, 4 and 8 channels; width 64 is torchvision's network."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        *,
        channels: int,
        classes: int,
        width: int,
        stem: str,
    ) -> None:
        nn.Module.__init__(self)  # ResNet.__init__ would first build and initialise a network of width 64
        self._norm_layer = nn.BatchNorm2d
        self.inplanes = width
        self.dilation, self.groups, self.base_width = 1, 1, 64
        kernel, stride, padding = (7, 2, 3) if stem == "stock" else (3, 1, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "stock" else nn.Identity()
        self.layer1 = self._make_layer(block, width, layers[0])
        self.layer2 = self._make_layer(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNetFamily(ArchitectureFamily):
    """ResNet-18, -34 and -50 with a `width` and one of two stems."""

    usage = ", ".join(RESNETS)
    fields: Mapping[str, Field] | None = {
        "channels": CHANNELS,
        "classes": CLASSES,
        "width": IntegerField(4, MAX_WIDTH),
        "stem": ChoiceField(STEM_KINDS),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is the name of one of the three networks."""
        return arch in RESNETS

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return width and stem; ResNets accept images of any size."""
        return {"width": width, "stem": stem}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build a `ScalableResNet`."""
        block, layers = RESNETS[arch]
        return ScalableResNet(block, layers, **options)  # type: ignore[arg-type]

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return those of layer1 to layer4 that the model has, if it has at least three of them."""
        modules = dict(model.named_modules())
        names = [name for name in STAGES if name in modules]
        return names if len(names) >= 3 else ()

    def translation_of(self, name: str) -> Translation | None:
        """Return the torchvision name of a tensor of a transformers ResNet."""
        return torchvision_name(name)


def torchvision_name(name: str) -> Translation | None:
    """Return the torchvision name of a transformers ResNet tensor, its prefix kept; None for other names.

    A file has the backbone's names with `resnet.` or without it. These are two spellings.
    """
    if match := _STEM.fullmatch(name):
        prefix, kind, leaf = match.groups()
        target = "conv1" if kind == "convolution" else "bn1"
    elif match := _INNER.fullmatch(name):
        prefix, stage, block, layer, kind, leaf = match.groups()
        target = f"layer{int(stage) + 1}.{block}.{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}"
    elif match := _SHORTCUT.fullmatch(name):
        prefix, stage, block, kind, leaf = match.groups()
        target = f"layer{int(stage) + 1}.{block}.downsample.{int(kind == 'normalization')}"
    elif match := _HEAD.fullmatch(name):
        prefix, leaf = match.groups()
        return Translation(f"{prefix}fc.{leaf}", None)
    else:
        return None
    spelling = "transformers backbone"
    if prefix == "resnet." or prefix.endswith(".resnet."):
        prefix, spelling = prefix.removesuffix("resnet."), "transformers"
    return Translation(f"{prefix}{target}.{leaf}", spelling)
