from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.watermark.kit import detector_for_kit
from tests.unit.attacks.helpers import Maker


@pytest.fixture
def module(tiny_model: Maker) -> nn.Module:
    """A tiny network without a watermark."""
    return tiny_model()


@pytest.fixture
def marked_module(marked_model: Any, tiny_model: Maker) -> nn.Module:
    """A tiny network that carries the watermark of `key`."""
    model = tiny_model()
    model.load_state_dict(marked_model[1].tensors)
    return model.eval()


@pytest.fixture
def key(marked_model: Any) -> MTLSignKey:
    return MTLSignKey(detector_for_kit(marked_model[1].kit))
