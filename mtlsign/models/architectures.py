"""Construction of networks from architectures, and the default taps of a network.

An architecture is a name from an allow-list with a few integers. The verifier therefore builds a network
without code of the claimant (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.factories import Factory
from mtlsign.models.families import FAMILIES, ArchitectureFamily, family_of
from mtlsign.models.families.base import check_fields
from mtlsign.models.families.timm import MAX_PARAMETERS
from mtlsign.models.stages import stages_of
from mtlsign.models.taps import last_layer

__all__ = ["MAX_PARAMETERS", "architecture_for", "build", "build_template", "default_taps"]


def architecture_for(
    model_name: str,
    *,
    classes: int,
    channels: int | None = None,
    vocabulary: int | None = None,
    embedding: int | None = None,
    width: int = 64,
    stem: str = "stock",
    size: int | None = None,
    outputs: Literal["labels", "instances", "images"] = "labels",
) -> dict[str, object]:
    """Return the checked architecture of a model name.

    Args:
        model_name: resnet18, resnet34, resnet50, the same after `cascade-`, lstm, bilstm, gru, bigru,
            dcgan, `timm/NAME` or `custom/package.module:function`.
        classes: outputs of the network.
        channels: image channels; None for texts.
        vocabulary: number of token ids; None for images.
        embedding: numbers of one token's vector; None for images.
        width: channels of the first stage of a ResNet, or units of a recurrent layer in each direction.
        stem: "stock" or "cifar", for ResNets.
        size: image size in pixels, only for timm networks with a fixed one and for detectors.
        outputs: whether the task needs labels of whole inputs, instances of objects, or new images.

    Returns:
        The JSON object that the spec stores under `architecture`.

    Raises:
        ModelError: unknown name, or a value outside its limits.
    """
    family = family_of(model_name)
    kind = "text" if channels is None else "image"
    if family.inputs not in ("any", kind):
        fitting = ", ".join(family.usage for family in FAMILIES if family.inputs in ("any", kind))
        raise ModelError(
            f"{model_name!r} reads {family.inputs}s, and the task has {kind}s. Use one of {fitting}.",
            field="model",
        )
    if family.outputs not in ("any", outputs):
        fitting = ", ".join(
            own.usage for own in FAMILIES if own.outputs in ("any", outputs) and own.inputs in ("any", kind)
        )
        raise ModelError(
            f"{model_name!r} returns {family.outputs}, and the task needs {outputs}. Use one of {fitting}.",
            field="model",
        )
    inputs = {"channels": channels, "vocabulary": vocabulary, "embedding": embedding, "classes": classes}
    architecture = {
        "arch": model_name,
        **{name: value for name, value in inputs.items() if value is not None},
        **family.options(width=width, stem=stem, size=size),
    }
    _check_architecture(architecture)
    return architecture


def _check_architecture(architecture: Mapping[str, object]) -> tuple[ArchitectureFamily, str]:
    arch = architecture.get("arch")
    if not isinstance(arch, str):
        raise ModelError('The architecture has no name. Give "arch".', field="architecture")
    family = family_of(arch)
    check_fields(family, arch, architecture)
    return family, arch


def build(architecture: Mapping[str, object], *, factories: Mapping[str, Factory] | None = None) -> nn.Module:
    """Build the network of an architecture in float32, with random weights from torch's global generator.

    Args:
        architecture: fields of the spec's `architecture`.
        factories: trusted factories of custom architectures by path. A verifier takes them from the
            operator's settings, an owner from `mtlsign.models.factories.load_factory`.

    Raises:
        ModelError: an architecture that is not on the allow-list or outside its limits.
    """
    family, arch = _check_architecture(architecture)
    return family.build(arch, _options(architecture), factories or {})


def build_template(
    architecture: Mapping[str, object], *, factories: Mapping[str, Factory] | None = None
) -> nn.Module:
    """Build the part of a network that a verifier needs: a detector's body, or the whole network.

    Its tensors have the names that they have in the whole network. See `build` for arguments and errors.
    """
    family, arch = _check_architecture(architecture)
    return family.build_template(arch, _options(architecture), factories or {})


def _options(architecture: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in architecture.items() if name != "arch"}


#: Kinds of heads.
HeadKind = Literal["spread", "keyed", "free"]


def default_taps(model: nn.Module, kind: HeadKind, sample: Tensor | None = None) -> tuple[str, ...]:
    """Return the names of the modules whose outputs carry the watermark by default.

    A keyed head reads the first stage, a free head the first three (paper, section 4.1). A spread head marks
    everything before the end of the last stage. Networks of texts can have fewer stages: a free head then
    reads all of them, and in networks without stages a spread head marks all layers. The recurrent layers of
    a text classifier are one stage, as c_WM reads them in the paper (figure 4).

    Args:
        model: the network.
        kind: kind of the head.
        sample: two inputs, from which the stages are read if no family knows them.

    Raises:
        ModelError: the stages are unknown.
    """
    count = 3 if kind == "free" else 1
    stages = next((stages for family in FAMILIES if (stages := family.stages(model))), ())
    is_text = sample is not None and not sample.is_floating_point()
    if not stages and is_text and kind == "spread":
        return (last_layer(model, sample),)
    if is_text and stages:
        count = min(count, len(stages))
    if len(stages) < count and sample is not None and not is_text:
        stages = stages_of(model, sample)
        count = 1
    if len(stages) < count:
        examples = ", ".join([name for name, _ in model.named_modules()][1:6])
        raise ModelError(
            f"The stages of {type(model).__name__} are unknown. "
            f"Name modules with --taps, such as {examples}.",
            field="taps",
        )
    return (stages[-1],) if kind == "spread" else tuple(stages[: 3 if kind == "free" else 1])
