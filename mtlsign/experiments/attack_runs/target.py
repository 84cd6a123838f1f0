"""An attack run: one marked model, many attacks, a row for each.

`open_campaign` reads and checks everything before anything is written; `run` carries the orders out in the
places that a `Crew` offers (`InTurn` is this process, `mtlsign.distributed.attacks.RayCrew` is Ray) and keeps
every row as it comes, so that an interrupted run loses nothing that was finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DataError, ModelError, SettingsError
from mtlsign.models import architectures
from mtlsign.models.factories import load_factory
from mtlsign.storage.model_folder import LoadedModel, read_model
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.kit import OwnerKit, open_kit


@dataclass(frozen=True)
class AttackTarget:
    """All that a process needs to attack one model. It holds the opened key: SECRET, never shown."""

    tensors: bytes = field(repr=False)
    kit: OwnerKit = field(repr=False)
    graph: Mapping[str, object]
    factory: str | None
    task: str
    data: Path | None
    download: bool
    split_seed: int
    extra: float
    lr: float
    copies: tuple[bytes, ...] = field(repr=False)
    bits: float

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The marked network. Raises `ModelError` where its tensors are not the architecture's."""
        arch = str(self.graph["arch"])
        factories = {self.factory: load_factory(self.factory)} if self.factory else {}
        if arch.startswith("own/") and arch[4:] not in factories:
            raise ModelError(
                f"is of an own architecture; if you trust that code: --factory {arch[4:]}", field="factory"
            )
        network = architectures.build(self.graph, factories=factories)
        try:
            network.load_state_dict(parse_safetensors(self.tensors))
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            raise ModelError(
                f"is not the architecture that its config names ({detail}); give the marked model itself",
                field="model",
            ) from None
        return network.to(device).to(memory_format=torch.channels_last).eval()

    def load_task(self) -> Task:
        """The primary task with the splits of the embedding. Raises `DataError`."""
        task = _task(self.task, self.data, self.download, self.split_seed)
        for name in ("channels", "classes"):
            if self.graph.get(name, getattr(task, name)) != getattr(task, name):
                raise DataError(
                    f"has {getattr(task, name)} {name}, the model {self.graph[name]}; name the model's own",
                    field="task",
                )
        return task


@lru_cache(maxsize=1)  # warm processes attack again and again
def _task(name: str, data: Path | None, download: bool, seed: int) -> Task:
    return load_task(name, data=data, download=download, seed=seed)


def load_target(settings: AttackSettings) -> AttackTarget:
    """Read the model, the kit, the copies and their task; check that they belong together.

    Raises:
        MTLSignError: anything that is missing, damaged, not trusted, or does not fit.
    """
    for name in ("model", "kit"):
        if getattr(settings, name) is None:
            raise SettingsError("is required; --attacks list needs none", field=name)
    kit = open_kit(settings, str(settings.kit))
    model = read_model(str(settings.model), endpoint=settings.endpoint)
    graph = model.config.get("graph")
    graph = graph if isinstance(graph, dict) else kit.opening.parse().graph
    task = settings.task or _task_name(model, kit)
    places = [p.strip() for p in (settings.copies or "").split(",") if p.strip()]
    copies = tuple(
        serialize_safetensors(read_model(place, endpoint=settings.endpoint).tensors) for place in places
    )
    seed = kit.info.get("seed")
    return AttackTarget(
        tensors=serialize_safetensors(model.tensors),
        kit=kit,
        graph=graph,
        factory=settings.factory,
        task=task,
        data=settings.data,
        download=settings.download,
        split_seed=settings.split_seed
        if settings.split_seed is not None
        else seed
        if isinstance(seed, int)
        else 0,
        extra=settings.budget,
        lr=settings.lr or _training_rate(kit, task, graph),
        copies=copies,
        bits=settings.bits,
    )


def _task_name(model: LoadedModel, kit: OwnerKit) -> str:
    """The task that the model or the kit names, unless it is code: that needs the caller's word."""
    named = model.config.get("task", kit.info.get("task"))
    if not isinstance(named, str) or not 0 < len(named) <= 200 or named == "own":
        raise DataError("is not named by the model; give --task", field="task")
    if ":" in named:
        raise DataError(f"is code; if you trust it: --task {named[:120]}", field="task")
    return named


def _training_rate(kit: OwnerKit, task: str, graph: Mapping[str, object]) -> float:
    """Phase 1's peak rate: as the kit says, else the default for the task and width."""
    known = kit.info.get("lr")
    if isinstance(known, float) and 0 < known <= 100:
        return known
    width = graph.get("width")
    given = {"task": task} | ({"width": width} if isinstance(width, int) else {})
    return EmbedSettings.of(given).resolved().lr or 0.1


# -- one attack --------------------------------


# -- many attacks --------------------------------
