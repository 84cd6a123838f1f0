"""Hostile files of a marked network with stages: every one gets a verdict, and none hides the mark."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mtlsign
from mtlsign.errors import ArtifactError
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import MAX_REFERENCE_BYTES, Reference
from tests.unit.attacks.helpers import VISION_OPTIONS
from tests.unit.models.swin_examples import timm_swin

Tensors = dict[str, Tensor]
REDUCTION, PATCHES = "layers.1.downsample.reduction.weight", "patch_embed.proj.weight"
GAIN, TABLE = "layers.1.downsample.norm.weight", "layers.0.blocks.0.attn.relative_position_bias_table"
#: Most seconds of one verdict on these files; a slow machine takes a tenth of it.
MOST_SECONDS = 60.0


@pytest.fixture(scope="module")
def marked(tiny_task: Task) -> tuple[nn.Module, WatermarkDetector]:
    model = timm_swin()
    result = mtlsign.embed(model, tiny_task, trained=True, identity=Identity.generate(), **VISION_OPTIONS)
    return model, detector_for_kit(result.kit, "tests.unit.models.swin_examples:timm_swin")


def with_many_stages(state: Tensors, count: int = 20_000) -> Tensors:
    """Add the output matrices of many further stages."""
    matrix = torch.ones(2, 2)
    return state | {f"layers.{number}.blocks.0.attn.proj.weight": matrix for number in range(2, count)}


FILES: dict[str, Callable[[Tensors], Tensors]] = {
    "no width": lambda s: {**s, REDUCTION: s[REDUCTION][:0]},
    "no inputs": lambda s: {**s, REDUCTION: s[REDUCTION][:, :0]},
    "no dimensions": lambda s: {**s, REDUCTION: torch.ones(()), PATCHES: torch.ones(())},
    "three positions": lambda s: {**s, REDUCTION: s[REDUCTION][:, :48]},
    "one position": lambda s: {**s, REDUCTION: s[REDUCTION][:, :16]},
    "width of the first stage": lambda s: {**s, REDUCTION: s[REDUCTION][:16]},
    "one number more": lambda s: {**s, REDUCTION: torch.ones(32, 65)},
    "patches of the second stage": lambda s: {**s, PATCHES: torch.ones(32, 1, 3, 3)},
    "gains of one position": lambda s: {**s, GAIN: s[GAIN][:16]},
    "zero sources": lambda s: {**s, REDUCTION: torch.zeros(32, 64), PATCHES: torch.zeros(16, 1, 3, 3)},
    "no sources": lambda s: {name: t for name, t in s.items() if name not in (REDUCTION, PATCHES)},
    "huge table": lambda s: {**s, TABLE: torch.zeros(2_000_000, 2)},
    "table without heads": lambda s: {**s, TABLE: torch.zeros(49, 0)},
    "many stages": with_many_stages,
}


@pytest.mark.parametrize("case", FILES)
def test_file_with_stages_of_other_sizes_keeps_its_mark(
    case: str, marked: tuple[nn.Module, WatermarkDetector]
) -> None:
    model, detector = marked
    state = FILES[case](dict(model.state_dict()))
    start = time.monotonic()
    verdict = verify(state, detector)
    assert time.monotonic() - start < MOST_SECONDS
    assert verdict.accepted and verdict.matches == 128, verdict


def test_numbers_of_any_size_get_a_verdict(marked: tuple[nn.Module, WatermarkDetector]) -> None:
    model, detector = marked
    largest = torch.finfo(torch.float32).max
    state = {n: t.sign() * largest if t.dim() > 1 else t for n, t in model.state_dict().items()}
    assert verify(state, detector).status in ("accepted", "rejected", "unrelated", "not_verifiable")
    state |= {PATCHES: torch.randn(16, 1, 3, 3), REDUCTION: torch.randn(32, 64) * largest}
    state[REDUCTION] = state[REDUCTION].clamp(-largest, largest)
    assert verify(state, detector).status in ("accepted", "rejected", "unrelated", "not_verifiable")


def test_blocks_in_too_many_places_of_two_stages_are_not_verifiable(
    marked: tuple[nn.Module, WatermarkDetector],
) -> None:
    model, detector = marked
    torch.manual_seed(8)
    state = {name: torch.randn(t.shape) for name, t in model.state_dict().items()}
    state |= {
        f"g{place}.layers.{stage}.blocks.{block}.attn.proj.weight": torch.ones(2, 2)
        for place in range(9)
        for stage in range(2)
        for block in range(3)
    }
    verdict = verify(state, detector)
    assert verdict.status == "not_verifiable" and "over 8 places" in str(verdict.reason)


def test_reference_of_a_million_stages_is_refused_by_its_size() -> None:
    entry = {"dtype": "F16", "shape": [0, 0], "data_offsets": [0, 0]}
    header = {f"layers.{number}.downsample.reduction.weight/rows": entry for number in range(1_000_000)}
    data = json.dumps(header).encode()
    assert len(data) > MAX_REFERENCE_BYTES
    with pytest.raises(ArtifactError, match="over 67108864 bytes"):
        Reference.from_bytes(struct.pack("<Q", len(data)) + data)


def test_exchanged_blocks_of_every_stage_keep_the_mark(marked: tuple[nn.Module, WatermarkDetector]) -> None:
    model, detector = marked
    other = {"blocks.0.": "blocks.1.", "blocks.1.": "blocks.0."}
    state = {}
    for name, tensor in model.state_dict().items():
        part = next((part for part in other if part in name), "")
        state[name.replace(part, other.get(part, "")) if part else name] = tensor
    assert state.keys() == model.state_dict().keys()
    before, after = verify(model.state_dict(), detector), verify(state, detector)
    assert after.matches == before.matches and after.readings <= 4
