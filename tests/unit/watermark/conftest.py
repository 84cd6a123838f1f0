"""Fixtures of the tests of the watermark."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference


@pytest.fixture(scope="module")
def detector(marked_model: tuple[dict[str, Tensor], Any]) -> WatermarkDetector:
    """Return the detector of the marked network's kit."""
    kit = marked_model[1].kit
    return WatermarkDetector(kit.opening, Reference.from_bytes(kit.reference))
