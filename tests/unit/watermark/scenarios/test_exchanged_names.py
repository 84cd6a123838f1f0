"""Transformers and recurrent networks whose names have another tensor's meaning, or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.models.architectures import build
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.verdict import Verdict
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import KINDS, architecture, marked_transformer
from tests.unit.watermark.scenarios.exchanged_files import noisy, renumbered

Tensors = dict[str, Tensor]
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def verdict_on(result: EmbeddingResult, tensors: Tensors) -> Verdict:
    return verify(tensors, detector_for_kit(result.kit), bits=60)


@ALL_KINDS
@pytest.mark.parametrize("change", ["nothing", "noise", "rotate_stream", "attention_symmetries"])
def test_blocks_with_exchanged_numbers_keep_every_bit(kind: str, change: str) -> None:
    model, result, _ = marked_transformer(kind)
    state = dict(model.state_dict())
    if change == "noise":
        state = noisy(state)
    elif change != "nothing":
        state = dict(run(change, model, text_task(), seed=1).model.state_dict())
    verdict = verdict_on(result, renumbered(state))
    assert verdict.accepted and verdict.matches == 128 and verdict.readings <= 3


@ALL_KINDS
def test_independent_network_with_exchanged_blocks_is_unrelated(kind: str) -> None:
    _, result, _ = marked_transformer(kind)
    torch.manual_seed(9)
    state = dict(build(architecture(kind)).state_dict())
    by_name, exchanged = verdict_on(result, state), verdict_on(result, renumbered(state))
    assert by_name.status == exchanged.status == "unrelated"
    assert by_name.readings == exchanged.readings <= 2
