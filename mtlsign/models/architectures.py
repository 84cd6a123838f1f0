"""Which networks can carry a mark, and how their early feature maps are reached without changing them.

A network is written in the spec as a `graph`: an architecture name from an allow-list with its integers
(design decision 2), so that the verifier builds it without any code of the claimant (decision 8). Taps are
module names (decision 7), reached by `mtlsign.models.taps`, whose names are repeated here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mtlsign.errors import ModelError
from mtlsign.models.factories import FACTORY_PATH, Factory, call_factory
from mtlsign.models.taps import (
    TappedLayer,
    batch_norm_types,
    forward_to_taps,
    tapped_layers,
    tapped_parameters,
)

__all__ = [
    "LIMITS",
    "MAX_PARAMETERS",
    "RESNETS",
    "STEM_KINDS",
    "Factory",
    "TappedLayer",
    "architecture_for",
    "batch_norm_types",
    "build",
    "default_taps",
    "forward_to_taps",
    "tapped_layers",
    "tapped_parameters",
]


RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
STEM_KINDS = ("stock", "cifar")
LIMITS = {"channels": (1, 16), "classes": (1, 65_536), "width": (4, 128), "size": (21, 1024)}
MAX_PARAMETERS = 400_000_000

_TIMM_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_STEM = re.compile(r"(stem|conv_stem|conv_?[01]\b|(features\.)?(bn|act|norm)[01]\b|act2\b|relu|layer0)")


class ScalableResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet with `width` times 1, 2, 4, 8 planes: its very own at 64 with the stock stem."""

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
        nn.Module.__init__(self)  # ResNet.__init__ would build (and draw) a whole 64-wide network first
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


def architecture_for(
    model_name: str,
    *,
    channels: int,
    classes: int,
    width: int = 64,
    stem: str = "stock",
    size: int | None = None,
) -> dict[str, object]:
    """The spec's `graph` of a model name, all its fields checked.

    `model_name` is resnet18, resnet34 or resnet50 (with `width` and `stem`), `timm/<name>` (with the image
    `size` in pixels only where the model has a fixed one), or `own/package.module:function`.
    Raises ModelError for unknown names and values outside `LIMITS`.
    """
    graph: dict[str, object] = {"arch": model_name, "channels": channels, "classes": classes}
    if model_name in RESNETS:
        graph |= {"width": width, "stem": stem}
    elif size is not None:
        graph["size"] = size
    _check_architecture(graph)
    return graph


def _check_architecture(graph: Mapping[str, object]) -> str:
    arch = graph.get("arch")
    if not isinstance(arch, str):
        raise ModelError('the graph needs an architecture name: give "arch"', field="graph")
    if arch in RESNETS:
        allowed = {"arch", "channels", "classes", "width", "stem"}
    elif arch.startswith("timm/") and _TIMM_NAME.fullmatch(arch[5:]):
        allowed = {"arch", "channels", "classes", "size"}
    elif arch.startswith("own/") and FACTORY_PATH.fullmatch(arch[4:]):
        allowed = set(graph)
    else:
        raise ModelError(
            f"unknown architecture {arch[:80]!r}: use {', '.join(RESNETS)}, timm/NAME "
            "or own/package.module:function",
            field="model",
        )
    required = allowed - {"size"}
    if set(graph) - allowed or required - set(graph):
        raise ModelError(
            f"the graph of {arch!r} has exactly the fields {', '.join(sorted(required))}: correct it",
            field="graph",
        )
    for name, (low, high) in LIMITS.items():
        if name in graph and arch[:4] != "own/":
            value = graph[name]
            if type(value) is not int or not low <= value <= high:
                raise ModelError(f"must be a whole number from {low} to {high}: change it", field=name)
    if arch in RESNETS and graph["stem"] not in STEM_KINDS:
        raise ModelError(f"must be one of {', '.join(STEM_KINDS)}: change it", field="stem")
    return arch


def build(graph: Mapping[str, object], *, factories: Mapping[str, Factory] | None = None) -> nn.Module:
    """The network of a `graph`, float32, random from torch's global generator; nothing is downloaded.

    `own/package.module:function` is built only from `factories` {"package.module:function": callable}, which
    a verifier takes from its operator's settings and the owner from `load_factory` (design decision 7).
    Raises ModelError for anything not on the allow-list or outside its limits.
    """
    arch = _check_architecture(graph)
    options = {name: value for name, value in graph.items() if name != "arch"}
    if arch in RESNETS:
        block, layers = RESNETS[arch]
        return ScalableResNet(block, layers, **options)  # type: ignore[arg-type]
    if arch.startswith("timm/"):
        return _build_timm(arch[5:], options)
    factory = (factories or {}).get(arch[4:])
    if factory is None:
        raise ModelError(
            f"the factory {arch[4:]!r} is not registered here: its operator must name it in the settings "
            "(a factory is never imported from a kit, claim or config)",
            field="model",
        )
    model = call_factory(arch[4:], factory, options, field="model")
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {arch[4:]!r} must return a torch.nn.Module: change it", field="model")
    return model


def _build_timm(name: str, options: Mapping[str, object]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ModelError("timm is not installed: install the extra `mtlsign[timm]`", field="model") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ModelError(f"timm knows no model {name!r}: {hint}", field="model")
    keywords: dict[str, Any] = {"in_chans": options["channels"], "num_classes": options["classes"]}
    if "size" in options:
        keywords["img_size"] = options["size"]
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name, pretrained=False, **keywords).parameters())
        if count > MAX_PARAMETERS:
            raise ModelError(
                f"timm/{name} has {count:,} parameters, the limit is {MAX_PARAMETERS:,}: use a smaller model",
                field="model",
            )
        model: nn.Module = timm.create_model(name, pretrained=False, **keywords)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r} with {keywords} ({type(error).__name__}: {str(error)[:120]}): "
            "use other values",
            field="model",
        ) from None
    return model


def default_taps(model: nn.Module, kind: Literal["keyed", "free"]) -> tuple[str, ...]:
    """Names of the modules whose outputs carry the mark unless taps are given.

    `keyed`: the first stage (design decision 4); `free`: the first three (paper §4.1). Raises ModelError for
    a model whose stages are not known.
    """
    modules = dict(model.named_modules())
    stages = [name for name in ("layer1", "layer2", "layer3", "layer4") if name in modules]
    if len(stages) < 3:
        stages = [name for name in _timm_stages(model) if name in modules]
    wanted = 1 if kind == "keyed" else 3
    if len(stages) < wanted:
        some = ", ".join(name for name in list(modules)[1:6])
        raise ModelError(
            f"the stages of {type(model).__name__} are not known: name modules with --taps (such as {some})",
            field="taps",
        )
    return tuple(stages[:wanted])


def _timm_stages(model: nn.Module) -> list[str]:
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    names = [entry.get("module") for entry in entries if isinstance(entry, Mapping)]
    return list(dict.fromkeys(n for n in names if isinstance(n, str) and n and not _STEM.match(n)))
