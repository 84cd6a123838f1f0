"""An adversary as an owner: a key of his own on the stolen model, by the same machinery as everybody's."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

from torch import nn

from mtlsign.attacks.base import Budget, device_of
from mtlsign.config.embed import EmbedSettings
from mtlsign.models.loading import cpu_state
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import Probe
from mtlsign.watermark.verification.reference import Reference

_ARCH = "attacked:model"


def settings(budget: Budget, seed: int, model: nn.Module, **options: Any) -> EmbedSettings:
    """Embedding settings that suit the stolen model; rates follow its first layer's width."""
    width = max(4, min(256, len(next(p for p in model.parameters() if p.dim() > 1))))
    given = {"task": "own", "width": width, "lr": budget.lr, "seed": seed, "insecure_test_key": True}
    return EmbedSettings.of(given | options).resolved()


def claim(
    model: nn.Module, task: Task, s: EmbedSettings
) -> tuple[KeyOpening, Reference, Callable[..., Probe]]:
    """His key, with the stolen model as his W0; the third makes its probe, with a trained head if given."""
    clean = copy.deepcopy(model)
    graph = {"arch": f"own/{_ARCH}", "channels": task.channels, "classes": task.classes}
    thief = Identity(hashlib.sha256(f"mtlsign adversary {s.seed}".encode()).digest(), bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = pipeline.commit(
        copy.deepcopy(model).cpu(), cpu_state(clean), graph, geometry, s, thief
    )
    factories = {_ARCH: lambda: copy.deepcopy(clean).cpu()}

    def probe(head: bytes | None = None) -> Probe:
        return Probe(opening, reference, head=head, device=device_of(model), factories=factories)

    return opening, reference, probe
