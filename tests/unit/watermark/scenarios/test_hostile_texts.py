"""Hostile files of networks of texts: every one gets a verdict, and none hides a mark that is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.verdict import Verdict
from tests.unit.attacks.text_examples import marked_text_network
from tests.unit.attacks.transformer_examples import marked_transformer

Tensors = dict[str, Tensor]
QUERY, OUTPUT = "blocks.0.attention.query.weight", "blocks.0.attention.output.weight"
HUGE = torch.finfo(torch.float32).max


def verdict_on(result: EmbeddingResult, tensors: Tensors) -> Verdict:
    return verify(tensors, detector_for_kit(result.kit))


def huge(state: Tensors) -> Tensors:
    return {n: t.sign() * HUGE if t.dim() > 1 else t for n, t in state.items()}


def huge_in_other_coordinates(state: Tensors) -> Tensors:
    vectors = torch.randn(state["embedding.weight"].shape, generator=torch.Generator().manual_seed(0))
    return huge(state) | {"embedding.weight": vectors}


SIZES: dict[str, Callable[[Tensors], Tensors]] = {
    "further columns": lambda s: {**s, QUERY: torch.ones(len(s[QUERY]), 2 * s[QUERY].shape[1])},
    "further rows of the stream": lambda s: {**s, OUTPUT: torch.ones(2 * len(s[OUTPUT]), s[OUTPUT].shape[1])},
    "one small head": lambda s: {
        **s, QUERY: torch.ones(4, s[QUERY].shape[1]), OUTPUT: torch.ones(len(s[OUTPUT]), 4)
    },
    "no dimensions": lambda s: {**s, QUERY: torch.ones(()), OUTPUT: torch.ones(0)},
    "short vocabulary": lambda s: {**s, "embedding.weight": s["embedding.weight"][:3]},
    "zero vectors": lambda s: {**s, "embedding.weight": torch.zeros_like(s["embedding.weight"])},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pre", "rms"])
@pytest.mark.parametrize("name", SIZES)
def test_transformer_with_one_tensor_of_another_size_keeps_its_mark(kind: str, name: str) -> None:
    model, result, _ = marked_transformer(kind)
    verdict = verdict_on(result, SIZES[name](dict(model.state_dict())))
    assert verdict.accepted, verdict


@pytest.mark.parametrize("change", [huge, huge_in_other_coordinates])
def test_numbers_of_any_size_get_a_verdict(change: Callable[[Tensors], Tensors]) -> None:
    networks = [marked_transformer("pre"), marked_transformer("rms"), marked_text_network()]
    for model, result, _ in networks:
        assert verdict_on(result, change(dict(model.state_dict()))).status in (
            "accepted", "rejected", "unrelated", "not_verifiable",
        )  # fmt: skip


def decoys(places: int, name: str) -> Tensors:
    """Return blocks of the wrong number in many places of a file."""
    return {f"g{i}.blocks.{b}.{name}": torch.ones(2, 2) for i in range(places) for b in range(3)}


@pytest.mark.parametrize("name", ["x.weight", "attention.output.weight"])
@pytest.mark.parametrize("places", [3, 300])
def test_decoy_blocks_do_not_hide_a_mark(name: str, places: int) -> None:
    model, result, _ = marked_transformer("rms")
    state = dict(model.state_dict()) | decoys(places, name)
    verdict = verdict_on(result, state)
    assert verdict.accepted and verdict.matches == 128 and verdict.readings <= 2


def test_too_many_blocks_in_an_unmarked_file_are_not_verifiable() -> None:
    model, result, _ = marked_transformer("rms")
    torch.manual_seed(8)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    verdict = verdict_on(result, state | decoys(9, "attention.output.weight"))
    assert verdict.status == "not_verifiable" and "over 8 places" in str(verdict.reason)


def test_numbers_with_leading_zeros_are_no_blocks() -> None:
    model, result, _ = marked_transformer("rms")
    state = dict(model.state_dict())
    other = {n.replace("blocks.0.", "blocks.00."): -t for n, t in state.items()}
    verdict = verdict_on(result, {**other, **state})
    assert verdict.matches == 128 and verdict.readings == 1
