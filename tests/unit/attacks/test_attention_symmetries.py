from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mtlsign
from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.attacker_data import transform_inputs
from mtlsign.attacks.equal_function import TOLERANCE, function_change
from mtlsign.models.architectures import build
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import OPTIONS, text_task
from tests.unit.attacks.transformer_examples import KINDS, architecture, marked_transformer


def marked_key(kind: str) -> tuple[nn.Module, MTLSignKey]:
    """Return a marked network and its key."""
    model, result, _ = marked_transformer(kind)
    return model, MTLSignKey(detector_for_kit(result.kit))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attention_symmetries", "rotate_stream", "permute_vocabulary"])
def test_free_attack_preserves_function_and_every_bit(kind: str, name: str) -> None:
    model, key = marked_key(kind)
    before = verify(model.state_dict(), key.detector)
    assert before.matches == before.n
    first, second = (run(name, model, text_task(), seed=3) for _ in range(2))
    state = second.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in first.model.state_dict().items())
    tokens, _ = text_task().splits["test"].batch(torch.arange(16))
    assert function_change(model, first.model, tokens, first.input_transforms) < TOLERANCE
    own = model.state_dict()
    assert any(not torch.equal(t, own[n]) for n, t in state.items())
    verdict = verify(state, key.detector)
    assert verdict.matches == before.matches and verdict.evidence_bits >= before.evidence_bits - 1


@pytest.mark.parametrize("kind", KINDS)
def test_unmarked_network_of_other_seed_is_unrelated(kind: str) -> None:
    _, key = marked_key(kind)
    torch.manual_seed(9)
    verdict = verify(build(architecture(kind)).state_dict(), key.detector)
    assert verdict.status == "unrelated" and verdict.evidence_bits < 20


@pytest.mark.parametrize("name", ["null_space:energy=0.9,noise=1", "prune:ratio=0.3", "int8", "tune:steps=3"])
def test_other_attacks_run_on_transformers(name: str) -> None:
    model, key = marked_key("pre")
    attacked = run(name, model, text_task(), seed=1, key=key).model
    own = model.state_dict()
    assert any(not torch.equal(t, own[n]) for n, t in attacked.state_dict().items())
    assert verify(attacked.state_dict(), key.detector).evidence_bits > 50


def test_unsketch_gives_heads_and_neurons_the_sketches_of_the_reference() -> None:
    model, key = marked_key("pre")
    before = verify(model.state_dict(), key.detector)
    attacked = run("unsketch", model, text_task(), seed=1, key=key).model
    after = verify(attacked.state_dict(), key.detector)
    assert before.similarity < 0.99 < after.similarity
    assert after.evidence_bits < before.evidence_bits


def test_attacks_on_other_networks_are_not_applicable(marked_module: nn.Module, tiny_task: Task) -> None:
    for name in ("attention_symmetries", "rotate_stream"):
        with pytest.raises(NotApplicableError):
            run(name, marked_module, tiny_task)


def test_rotate_stream_without_biases_for_those_of_norms_is_not_applicable() -> None:
    torch.manual_seed(0)
    model = build(architecture("pre") | {"bias": 0}).eval()
    with pytest.raises(NotApplicableError, match="no biases"):
        run("rotate_stream", model, text_task())


def test_scaled_neurons_and_stream_keep_every_bit() -> None:
    model, key = marked_key("rms")
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        state = changed.state_dict()
        for name, tensor in state.items():
            if name.endswith("mlp.up.weight"):
                scales = torch.exp(torch.randn(len(tensor), generator=generator))
                tensor.mul_(scales[:, None])
                state[name.replace("up", "down")].div_(scales)
        for name, tensor in state.items():  # norms undo a scale of the stream
            if name.endswith(("embedding.weight", "output.weight", "down.weight")):
                tensor.mul_(3)
    tokens, _ = text_task().splits["test"].batch(torch.arange(16))
    assert function_change(model, changed, tokens) < 1e-3  # the norms' eps is not scaled
    verdict = verify(changed.state_dict(), key.detector)
    assert verdict.matches == 128


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("further", ["", "+rotate_stream+attention_symmetries"])
def test_dummy_block_keeps_every_bit(place: int, further: str) -> None:
    model, key = marked_key("rms" if further == "" else "pre")
    attacked = run(f"dummy_block:place={place}{further}", model, text_task(), seed=4).model
    state = attacked.state_dict()
    assert any(name.startswith("blocks.2.") for name in state)
    before, after = (verify(tensors, key.detector) for tensors in (model.state_dict(), state))
    assert after.matches == before.matches == 128
    assert after.evidence_bits >= before.evidence_bits - 2
    names = {name: f"model.{name.replace('blocks', 'layers')}" for name in state}
    renamed = {names[name]: tensor for name, tensor in state.items()}  # read by content
    assert verify(renamed, key.detector).matches == 128


def test_removed_block_leaves_the_others() -> None:
    model, key = marked_key("rms")
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.0.")}
    state = {name.replace("blocks.1.", "blocks.0."): tensor for name, tensor in state.items()}
    verdict = verify(state, key.detector)
    assert verdict.matches > 120 and len(verdict.missing_layers) == 5


def test_dummy_block_of_networks_with_norms_after_the_sub_layers_is_not_applicable() -> None:
    model, _ = marked_key("post")
    for text in ("dummy_block", "dummy_block:place=9"):
        with pytest.raises(NotApplicableError):
            run(text, model, text_task())


@pytest.mark.parametrize("name", ["rotate_stream", "permute_vocabulary"])
def test_free_attack_on_tied_outputs_gives_them_a_matrix(name: str) -> None:
    torch.manual_seed(0)
    fields = {"tied": 1, "classes": 80, "pooling": "tokens"}
    model = build(architecture("rms") | fields).eval()
    outcome = run(name, model, text_task())
    tokens = torch.randint(1, 80, (4, 6))
    changed = outcome.model(transform_inputs(tokens, outcome.input_transforms))
    torch.testing.assert_close(changed, model(tokens), atol=1e-4, rtol=1e-3)
    assert "fc.weight" in outcome.model.state_dict()


def test_unsketch_of_chosen_layers_changes_these_alone() -> None:
    torch.manual_seed(0)
    model = build(architecture("pre"))
    layers = "blocks.0.attention.value_output,blocks.1.mlp.up"
    done = mtlsign.embed(
        model, text_task(), identity=Identity.generate(), architecture=architecture("pre"), layers=layers,
        **OPTIONS,
    )  # fmt: skip
    key = MTLSignKey(detector_for_kit(done.kit))
    state = model.state_dict()
    attacked = run("unsketch", model, text_task(), seed=1, key=key).model.state_dict()
    changed = {name for name, tensor in attacked.items() if not torch.equal(tensor, state[name])}
    assert changed == {"blocks.0.attention.value.weight", "blocks.1.mlp.up.weight"}
