"""Which network the owner marks: from settings, a checkpoint, a library's name, or a notebook's object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError
from mtlsign.models import architectures
from mtlsign.models.checkpoints import load_checkpoint, load_pretrained
from mtlsign.models.factories import Factory, load_factory

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class InputSpec:
    """What the driver must know of a task before any worker starts."""

    channels: int
    height: int
    width: int
    classes: int


def architecture_from_settings(settings: EmbedSettings, shape: InputSpec) -> dict[str, object]:
    """The spec's `graph` of the settings' model on this task."""
    name = f"own/{settings.model}" if ":" in settings.model else settings.model
    if len(name) > 128:
        raise ModelError(
            "is too long for a spec (124 characters); give the factory a shorter path", field="model"
        )
    return architectures.architecture_for(
        name,
        channels=shape.channels,
        classes=shape.classes,
        width=settings.width or 64,
        stem=settings.stem or "stock",
    )


def custom_factories(graph: Mapping[str, object]) -> dict[str, Factory]:
    """The owner's own architecture, imported on the owner's side only (design decision 7)."""
    arch = str(graph["arch"])
    return {arch[4:]: load_factory(arch[4:], field="model")} if arch.startswith("own/") else {}


def load_initial_weights(settings: EmbedSettings, graph: Mapping[str, object]) -> Tensors:
    """W0 from a trained checkpoint, or timm's pretrained weights."""
    model = architectures.build(graph, factories=custom_factories(graph))
    if settings.init == "pretrained":
        load_pretrained(model, graph)
    else:
        try:
            load_checkpoint(Path(str(settings.init)), model)
        except ModelError as error:
            raise ModelError(error.detail, field="init") from None
    return cpu_state(model)


def cpu_state(model: nn.Module) -> Tensors:
    """The state dict, detached, contiguous, on the CPU."""
    return {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}


def custom_architecture_name(kind: type[nn.Module]) -> str:
    """`own/package.module:Class` in the characters of a spec, also for `__main__` and classes inside
    functions.
    """
    home = ".".join(_identifier(part) for part in kind.__module__.split("."))[-60:].lstrip(".0123456789")
    return f"own/{home or '_'}:{_identifier(kind.__qualname__.replace('<locals>.', ''))}"


def _identifier(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", text)[-60:]
    return plain if plain[:1].isalpha() or plain.startswith("_") else f"_{plain}"


def require_same_architecture(module: nn.Module, graph: Mapping[str, object]) -> None:
    """A stranger builds `graph`: what is marked must have its tensors."""
    if str(graph.get("arch", "")).startswith("own/"):
        return
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in architectures.build(graph).state_dict().items()}
    given = {name: t.shape for name, t in module.state_dict().items()}
    if wanted != given:
        differs = next(n for n in (*wanted, *given) if wanted.get(n) != given.get(n))
        raise ModelError(
            f"is another architecture than the module's, such as at {differs!r}; leave it out, or correct it",
            field="graph",
        )
