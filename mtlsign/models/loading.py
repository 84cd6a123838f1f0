"""The network that the owner marks: its architecture, its initial weights and its name in the spec."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.embed_defaults import PRETRAINED
from mtlsign.errors import ModelError
from mtlsign.models import architectures, pretrained_transformer
from mtlsign.models.adapters import LowRankAdapter, read_adapter
from mtlsign.models.checkpoints import load_checkpoint
from mtlsign.models.factories import Factory, load_factory
from mtlsign.models.families import custom, family_of
from mtlsign.models.initial_weights import initialize_from_checkpoint
from mtlsign.models.input_spec import ImageSpec, InputSpec, TextSpec

Tensors = dict[str, Tensor]

#: Longest architecture name of a spec.
MAX_ARCH = 128


def architecture_from_settings(settings: EmbedSettings, input_spec: InputSpec) -> dict[str, object]:
    """Return the architecture of the settings' model for a task's inputs.

    Raises:
        ModelError: unknown model, a path that is too long for a spec, or a value outside its limits.
    """
    model = settings.model or "resnet18"
    if model.startswith(PRETRAINED):
        return _pretrained_architecture(model.removeprefix(PRETRAINED), input_spec)
    name = f"{custom.PREFIX}{model}" if ":" in model else model
    if len(name) > MAX_ARCH:
        raise ModelError(
            f"The path has {len(model)} characters, but a spec holds at most "
            f"{MAX_ARCH - len(custom.PREFIX)}. Give the factory a shorter path.",
            field="model",
        )
    return architectures.architecture_for(
        name,
        **input_spec.architecture_fields,
        width=settings.width or 64,
        stem=settings.stem or "stock",
        size=_image_size(name, input_spec),
        outputs=input_spec.outputs if input_spec.outputs in ("instances", "images") else "labels",
    )


def _pretrained_architecture(source: str, input_spec: InputSpec) -> dict[str, object]:
    """Return the architecture of a pretrained transformer for a task of texts."""
    if not isinstance(input_spec, TextSpec):
        raise ModelError(
            "A pretrained transformer reads texts, and the task has images. Use another --model.",
            field="model",
        )
    classes = None if input_spec.outputs == "tokens" else input_spec.classes
    architecture = pretrained_transformer.pretrained_architecture(source, classes=classes)
    if input_spec.length > int(str(architecture["length"])):
        raise ModelError(
            f"The texts of the task have up to {input_spec.length} tokens, and the model has "
            f"{architecture['length']} positions. Use another model.",
            field="model",
        )
    if input_spec.embedding is not None or input_spec.vocabulary > int(str(architecture["vocabulary"])):
        raise ModelError(
            f"The task has token ids of another vocabulary ({input_spec.vocabulary}). "
            "Give the tokenizer of the model with --tokenizer.",
            field="tokenizer",
        )
    return architecture


def initialize_pretrained(model: nn.Module, settings: EmbedSettings) -> None:
    """Copy the weights of a pretrained transformer, or of `phase1.initial_weights`, into a new network.

    Args:
        model: built from `architecture_from_settings`.
        settings: settings of the job.

    Raises:
        ModelError: the weights are missing, damaged or do not fit.
    """
    name = settings.model or ""
    if name.startswith(PRETRAINED):
        _initialize_transformer(model, name)
    if settings.phase1.initial_weights is not None:
        initialize_from_checkpoint(settings.phase1.initial_weights, model)


def _initialize_transformer(model: nn.Module, name: str) -> None:
    source = name.removeprefix(PRETRAINED)
    has_own_outputs = getattr(getattr(model, "shape", None), "pooling", "") == "tokens"
    loaded = pretrained_transformer.load_pretrained_transformer(
        source, classes=None if has_own_outputs else 2
    )
    own = {n: t for n, t in loaded.network.state_dict().items() if has_own_outputs or not n.startswith("fc.")}
    model.load_state_dict({**model.state_dict(), **own})


def _image_size(arch: str, input_spec: InputSpec) -> int | None:
    """Return the side of the task's images if the network is built for one size, else None.

    A detector is built for the longest side of the images.
    """
    if isinstance(input_spec, ImageSpec) and family_of(arch).outputs == "instances":
        return max(input_spec.height, input_spec.width)
    if not isinstance(input_spec, ImageSpec) or not family_of(arch).has_fixed_size(arch):
        return None
    if input_spec.height != input_spec.width:
        raise ModelError(
            f"{arch!r} reads square images, and the task has {input_spec.height}x{input_spec.width}. "
            "Use square images, or a network without a fixed size.",
            field="model",
        )
    return input_spec.height


def custom_factories(architecture: Mapping[str, object]) -> dict[str, Factory]:
    """Import the factory of a custom architecture; return no factory for other architectures.

    Only for the owner, because importing runs code.
    """
    path = custom.factory_path(str(architecture["arch"]))
    return {} if path is None else {path: load_factory(path, field="model")}


def load_initial_weights(
    settings: EmbedSettings,
    architecture: Mapping[str, object],
    *,
    log: Callable[[str], None] = lambda _: None,
) -> Tensors:
    """Load W0 from a trained checkpoint or from timm's pretrained weights, with the adapter merged into it.

    With an adapter and without `--weights`, the base is that of `--model hf:FOLDER`.

    Args:
        settings: settings of the job.
        architecture: fields of the spec's `architecture`.
        log: called with a sentence on the chosen weights if the file holds several.

    Raises:
        ModelError: the weights are unavailable or do not fit the architecture.
    """
    model = architectures.build(architecture, factories=custom_factories(architecture))
    if settings.weights is None:
        _load_base(model, settings)
    elif settings.weights == "pretrained":
        load_pretrained(model, architecture)
    else:
        try:
            load_checkpoint(Path(str(settings.weights)), model, key=settings.weights_key, log=log)
        except ModelError as error:
            field = error.field if error.field == "weights-key" else "weights"
            raise ModelError(error.detail, field=field) from None
    tensors = cpu_state(model)
    adapter = load_adapter(settings, tensors)
    return tensors if adapter is None else adapter.merged(tensors)


def load_adapter(settings: EmbedSettings, names: Collection[str]) -> LowRankAdapter | None:
    """Return the adapter of the settings for a network with tensors of these names; None without one."""
    return None if settings.adapter is None else read_adapter(Path(settings.adapter), names)


def _load_base(model: nn.Module, settings: EmbedSettings) -> None:
    """Load the pretrained base of an adapter. Raises `ModelError` for outputs that it does not have."""
    has_own_outputs = getattr(getattr(model, "shape", None), "pooling", "") == "tokens"
    if not (settings.model or "").startswith(PRETRAINED) or not has_own_outputs:
        raise ModelError(
            "The adapter changes a model whose weights are not given. Pass them with --weights.",
            field="adapter",
        )
    initialize_pretrained(model, settings)


def load_pretrained(model: nn.Module, architecture: Mapping[str, object]) -> None:
    """Load the pretrained weights of an architecture into a network that was built from it.

    Raises:
        ModelError: the architecture family has no pretrained weights, or they are unavailable.
    """
    arch = str(architecture["arch"])
    weights = family_of(arch).pretrained_weights(arch, architecture)
    try:
        model.load_state_dict(weights)
    except Exception as error:
        raise ModelError(
            f"The pretrained weights of {arch!r} do not fit ({type(error).__name__}). "
            "Download them and give the file.",
            field="weights",
        ) from None


def cpu_state(model: nn.Module) -> Tensors:
    """Return the state dict: detached, contiguous copies on the CPU.

    Tensors that are divided among ranks are gathered; all ranks must call this then.
    """
    state = {name: t.detach() for name, t in model.state_dict().items()}
    gathered = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: t.cpu().clone().contiguous() for name, t in gathered.items()}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a plain state dict, strictly.

    The version numbers of modules, which a plain mapping lacks, are those of the model itself; torchvision's
    MNASNet refuses a state dict without them.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


def custom_architecture_name(kind: type[nn.Module]) -> str:
    """Return `custom/package.module:Class` in the characters that a spec allows.

    Classes of `__main__` and classes inside functions get a name, too.
    """
    module = ".".join(_identifier(part) for part in kind.__module__.split("."))[-59:].lstrip(".0123456789")
    return f"{custom.PREFIX}{module or '_'}:{_identifier(kind.__qualname__.replace('<locals>.', ''))}"


def _identifier(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", text)[-60:]
    return plain if plain[:1].isalpha() or plain.startswith("_") else f"_{plain}"


def require_same_architecture(module: nn.Module, architecture: Mapping[str, object]) -> None:
    """Raise `ModelError` unless the module has the tensors of the architecture that verifiers build."""
    if custom.factory_path(str(architecture.get("arch", ""))) is not None:
        return
    with torch.device("meta"):
        expected = {name: t.shape for name, t in architectures.build(architecture).state_dict().items()}
    actual = {name: t.shape for name, t in module.state_dict().items()}
    if expected != actual:
        name = next(n for n in (*expected, *actual) if expected.get(n) != actual.get(n))
        raise ModelError(
            f"The architecture differs from the module's, such as at {name!r}. Correct it, or omit it.",
            field="architecture",
        )
