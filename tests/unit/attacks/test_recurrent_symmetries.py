"""Attacks on a marked network of recurrent layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtlsign.attacks import ATTACKS, NotApplicableError
from mtlsign.attacks.attacker_data import transform_inputs, transform_task
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import marked_text_network, text_network, text_task

#: Parameters with which an attack takes well under a second; the others need images or convolutions.
ON_TEXTS = {
    "ftal": "epochs=1,batch=32", "ftll": "epochs=1", "retrain": "epochs=1", "prune": "ratio=0.3",
    "int8": "", "overwrite": "epochs=2,n=128,images=16", "spoil": "steps=3,batch=16", "null_space": "",
    "tune": "steps=3,batch=16", "relearn": "epochs=1,batch=16", "unsketch": "",
    "recurrent_symmetries": "", "permute_vocabulary": "", "response_noise": "size=0.1",
    "low_rank": "share=0.9",
}  # fmt: skip


@pytest.fixture
def marked() -> tuple[nn.Module, Task, EmbeddingResult]:
    model, result, _ = marked_text_network()
    return model, text_task(), result


def test_embedding_into_text_network_is_accepted(marked: tuple[nn.Module, Task, EmbeddingResult]) -> None:
    model, _, result = marked
    assert result.verdict.accepted and result.verdict.matches == 128
    assert abs(result.verdict.controls["w0"][0] - 0.5) < 0.2
    # A verifier builds the network without the owner's objects.
    detector = detector_for_kit(result.kit, None)
    assert verify(model.state_dict(), detector).matches == 128
    assert verify(text_network(seed=5).state_dict(), detector).status == "unrelated"


@pytest.mark.parametrize("name", ["lstm", "bilstm", "gru", "bigru"])
def test_symmetries_preserve_function(name: str) -> None:
    model = text_network(name)
    before = copy.deepcopy(model.state_dict())
    first, second = (run("recurrent_symmetries", model, text_task(), seed=3).model for _ in range(2))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t, first.state_dict()[n]) for n, t in second.state_dict().items())
    tokens = text_task().splits["test"].batch(torch.arange(50)).inputs
    with torch.no_grad():
        expected, actual = model(tokens), first(tokens)
    assert float((expected - actual).abs().max() / expected.abs().max()) < TOLERANCE
    assert not any(torch.allclose(t, before[n]) for n, t in first.state_dict().items() if "weight" in n)


def test_vocabulary_in_another_order_preserves_function_with_renumbered_tokens() -> None:
    model, task = text_network(), text_task()
    outcome = run("permute_vocabulary", model, task, seed=3)
    tokens = task.splits["test"].batch(torch.arange(50)).inputs
    with torch.no_grad():
        torch.testing.assert_close(
            outcome.model(transform_inputs(tokens, outcome.input_transforms)), model(tokens)
        )
    transformed = transform_task(task, outcome.input_transforms)
    assert not torch.equal(transformed.splits["test"].batch(torch.arange(50)).inputs, tokens)


def test_vocabulary_in_another_order_leaves_every_bit(
    marked: tuple[nn.Module, Task, EmbeddingResult],
) -> None:
    model, task, result = marked
    detector = detector_for_kit(result.kit, None)
    for text in ("permute_vocabulary", "permute_vocabulary+recurrent_symmetries"):
        verdict = verify(run(text, model, task, seed=2).model.state_dict(), detector)
        assert verdict.accepted and verdict.matches == 128, text


def test_symmetries_leave_every_bit(marked: tuple[nn.Module, Task, EmbeddingResult]) -> None:
    model, task, result = marked
    detector = detector_for_kit(result.kit, None)
    for seed in range(3):
        attacked = run("recurrent_symmetries", model, task, seed=seed).model
        verdict = verify(attacked.state_dict(), detector)
        assert verdict.accepted and verdict.matches == 128, seed


@pytest.mark.parametrize("name", sorted(ON_TEXTS))
def test_attack_runs_on_texts(name: str, marked: tuple[nn.Module, Task, EmbeddingResult]) -> None:
    model, task, result = marked
    key = MTLSignKey(detector_for_kit(result.kit, None))
    text = f"{name}:{ON_TEXTS[name]}" if ON_TEXTS[name] else name
    before = copy.deepcopy(model.state_dict())
    outcome = run(text, model, task, seed=1, key=key)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    state = outcome.model.state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in state.items())
    assert verify(state, key.detector).status != "not_verifiable"


@pytest.mark.parametrize(
    "name",
    [
        "transpose_input",
        "turn_input:kind=rotated",
        "permute_channels",
        "scale_filters",
        "dummy_channels",
        "bn_fold",
    ],
)
def test_attack_on_images_is_not_applicable_to_texts(name: str) -> None:
    assert name.partition(":")[0] in ATTACKS
    with pytest.raises(NotApplicableError):
        run(name, text_network(), text_task())


def test_symmetries_on_images_are_not_applicable(tiny_task: Task) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 4)).eval()
    with pytest.raises(NotApplicableError, match="LSTM or GRU"):
        run("recurrent_symmetries", dense, tiny_task)
