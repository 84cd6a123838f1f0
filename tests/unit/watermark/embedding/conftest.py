"""Fixtures of the tests of embedding."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.models.input_spec import ImageSpec
from mtlsign.watermark.embedding import phase2
from mtlsign.watermark.embedding.commitment import commit_keys
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.detector import WatermarkDetector
from tests.unit.watermark.embedding.phase_helpers import (
    Maker,
)


@pytest.fixture
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> int:
    """Save checkpoints every 4 steps."""
    monkeypatch.setattr(phase2, "CHECKPOINT_STEPS", 4)
    return 4


@pytest.fixture
def detector_of(
    tiny_graph: dict[str, object], tiny_model: Maker, owner: Identity
) -> Callable[[EmbedSettings], WatermarkDetector]:
    """Return a function that makes a detector with `tiny_model()` as W0; equal settings give the same key."""

    def make(settings: EmbedSettings) -> WatermarkDetector:
        base_weights = tiny_model()
        (opening,), reference = commit_keys(
            base_weights,
            loading.cpu_state(base_weights),
            tiny_graph,
            ImageSpec(1, 24, 24, 4),
            settings,
            owner,
        )
        return WatermarkDetector(opening, reference)

    return make
