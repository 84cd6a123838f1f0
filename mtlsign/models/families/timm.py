"""Networks of the timm library, built by name."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mtlsign.errors import ModelError
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import CHANNELS, CLASSES, ArchitectureFamily, Field, IntegerField

PREFIX = "timm/"
#: Larger networks are rejected before any memory is allocated for them.
MAX_PARAMETERS = 400_000_000

#: Ratios of image size to feature map that a feature pyramid reads.
PYRAMID_STRIDES = (4, 8, 16, 32)

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_STEM = re.compile(r"(stem|conv_stem|conv_?[01]\b|(features\.)?(bn|act|norm)[01]\b|act2\b|relu|layer0)")


class TimmFamily(ArchitectureFamily):
    """`timm/NAME`, with the image `size` in pixels for networks that have a fixed one."""

    usage = f"{PREFIX}NAME"
    fields: Mapping[str, Field] | None = {
        "channels": CHANNELS,
        "classes": CLASSES,
        "size": IntegerField(21, 1024, required=False),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` has the form of a timm name; hub addresses do not."""
        return is_timm_name(arch)

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return the image size, if it is given."""
        return {} if size is None else {"size": size}

    def has_fixed_size(self, arch: str) -> bool:
        """Return whether timm builds the network for one image size, as it does vision transformers."""
        try:
            from timm.models import get_pretrained_cfg
        except ImportError:
            return False
        config = get_pretrained_cfg(arch[len(PREFIX) :], allow_unregistered=True)
        return bool(config is not None and config.fixed_input_size)

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build the network of a timm name, without pretrained weights.

        Raises:
            ModelError: timm is not installed, does not know the name, or rejects the options; or the
                network has more than `MAX_PARAMETERS` parameters.
        """
        model: nn.Module = _create(arch[len(PREFIX) :], _keywords(options))
        return model

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the modules that timm's `feature_info` lists after the stem."""
        modules = dict(model.named_modules())
        info = getattr(model, "feature_info", None)
        entries = getattr(info, "info", info)
        if not isinstance(entries, list | tuple):
            return ()
        names = [entry.get("module") for entry in entries if isinstance(entry, Mapping)]
        stages = dict.fromkeys(n for n in names if isinstance(n, str) and n and not _STEM.match(n))
        return [name for name in stages if name in modules]

    def pretrained_weights(self, arch: str, options: Mapping[str, object]) -> Mapping[str, Tensor]:
        """Return timm's weights from its hub or cache. Raises `ModelError` if they are unavailable."""
        name = arch[len(PREFIX) :]
        try:
            import timm

            model = timm.create_model(name, pretrained=True, **_keywords(options))
        except Exception as error:
            raise ModelError(
                f"timm's weights of {name!r} are unavailable ({type(error).__name__}). "
                "Download them and give the file.",
                field="weights",
            ) from None
        weights: Mapping[str, Tensor] = model.state_dict()
        return weights


def _keywords(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the keyword arguments of `timm.create_model` for the fields of an architecture."""
    size = {"img_size": options["size"]} if "size" in options else {}
    return {"in_chans": options["channels"], "num_classes": options["classes"], **size}


def _check_parameter_count(arch: str, model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_PARAMETERS:
        raise ModelError(
            f"{arch} has {count:,} parameters, more than the limit of {MAX_PARAMETERS:,}. "
            "Use a smaller model.",
            field="model",
        )


def is_timm_name(arch: str) -> bool:
    """Return whether `arch` has the form of a timm name; hub addresses do not."""
    return arch.startswith(PREFIX) and _NAME.fullmatch(arch[len(PREFIX) :]) is not None


def _create(name: str, keywords: Mapping[str, Any]) -> Any:
    """Build a network of timm with random weights, after a check of its size.

    Raises:
        ModelError: timm is not installed, does not know the name, or rejects the keywords; or the network has
            more than `MAX_PARAMETERS` parameters.
    """
    try:
        import timm
    except ImportError:
        raise ModelError("timm is not installed. Install the extra `mtlsign[timm]`.", field="model") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"Use a similar one, such as {', '.join(near)}." if near else "See timm.list_models()."
        raise ModelError(f"timm has no model {name!r}. {hint}", field="model")
    try:
        with torch.device("meta"):
            shapes = timm.create_model(name, pretrained=False, **keywords)
        _check_parameter_count(PREFIX + name, shapes)
        return timm.create_model(name, pretrained=False, **keywords)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r} with {dict(keywords)} ({type(error).__name__}: {str(error)[:120]}). "
            "Use other values.",
            field="model",
        ) from None


def feature_body(name: str) -> nn.Module:
    """Build a network of timm without its last layers, for a feature pyramid.

    Args:
        name: timm's name of a network with feature maps.

    Returns:
        A module that returns a list of the feature maps [n, C, H / s, W / s], s in `PYRAMID_STRIDES`. Its
        `return_layers` are the modules that return them, by their index, as in torchvision's bodies.

    Raises:
        ModelError: as for other networks of timm, or the network has other feature maps.
    """
    described = _create(name, {"features_only": True}).feature_info
    strides = list(described.reduction())
    if not all(strides.count(stride) == 1 for stride in PYRAMID_STRIDES):
        raise ModelError(
            f"{name!r} has feature maps with strides {strides}, and a feature pyramid reads "
            f"{', '.join(map(str, PYRAMID_STRIDES))}. Use another network.",
            field="model",
        )
    indices = [described.out_indices[strides.index(stride)] for stride in PYRAMID_STRIDES]
    body = _create(name, {"features_only": True, "out_indices": indices})
    modules = dict(body.named_modules())
    stages = [n if n in modules else n.replace(".", "_") for n in body.feature_info.module_name()]
    body.return_layers = {stage: str(index) for index, stage in enumerate(stages)}
    network: nn.Module = body
    return network


class PyramidBackbone(nn.Module):
    """Body of timm and a feature pyramid of five levels, as torchvision's `BackboneWithFPN`.

    Args:
        body: from `feature_body`.
        channels: channels of each level.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        widths: list[int] = body.feature_info.channels()  # type: ignore[union-attr, operator]
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the levels "0" to "3" and "pool" of images [n, 3, H, W]."""
        maps = OrderedDict((str(index), own) for index, own in enumerate(self.body(images)))
        levels: dict[str, Tensor] = self.fpn(maps)
        return levels
