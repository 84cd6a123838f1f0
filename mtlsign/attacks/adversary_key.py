"""An adversary as an owner: a key of his own on the stolen model, by the same machinery as everybody's."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

from torch import nn

from mtlsign.attacks.base import AttackerResources, device_of
from mtlsign.config.embed import EmbedSettings
from mtlsign.models.loading import cpu_state
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference

_ARCH = "attacked:model"


def adversary_settings(
    budget: AttackerResources, seed: int, model: nn.Module, **options: Any
) -> EmbedSettings:
    """Embedding settings that suit the stolen model; rates follow its first layer's width."""
    width = max(4, min(256, len(next(p for p in model.parameters() if p.dim() > 1))))
    given = {"task": "own", "width": width, "lr": budget.lr, "seed": seed, "insecure_test_key": True}
    return EmbedSettings.of(given | options).resolved()


def make_adversary_key(
    model: nn.Module, task: Task, settings: EmbedSettings
) -> tuple[KeyOpening, Reference, Callable[..., WatermarkDetector]]:
    """His key, with the stolen model as his W0; the third makes its probe, with a trained head if given."""
    clean = copy.deepcopy(model)
    graph = {"arch": f"own/{_ARCH}", "channels": task.channels, "classes": task.classes}
    thief = Identity(hashlib.sha256(f"mtlsign adversary {settings.seed}".encode()).digest(), bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = pipeline.commit_key(
        copy.deepcopy(model).cpu(), cpu_state(clean), graph, geometry, settings, thief
    )
    factories = {_ARCH: lambda: copy.deepcopy(clean).cpu()}

    def detector(head: bytes | None = None) -> WatermarkDetector:
        return WatermarkDetector(opening, reference, head=head, device=device_of(model), factories=factories)

    return opening, reference, detector
