"""Transformers and recurrent networks whose names have another tensor's meaning, or none."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import mtlsign
from mtlsign.models.architectures import build
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.alignment import RecurrentAligner, TransformerAligner
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.scores import matching_bits
from mtlsign.watermark.verification.verdict import Verdict
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import (
    OPTIONS,
    marked_text_network,
    text_architecture,
    text_task,
)
from tests.unit.attacks.transformer_examples import KINDS, architecture
from tests.unit.watermark.scenarios.exchanged_files import anonymous, exchanged, noisy, renumbered

Tensors = dict[str, Tensor]
TRANSFORMERS = ("pre", "post", "rms")
ALL_KINDS = pytest.mark.parametrize("kind", [*TRANSFORMERS, "bilstm"])
FORMS: dict[str, Callable[[Tensors], Tensors]] = {"anonymous": anonymous, "exchanged": exchanged}


@cache
def marked(kind: str) -> tuple[nn.Module, EmbeddingResult]:
    """Return a network that is marked with a fixed key; callers must not change it."""
    if kind == "bilstm":
        return marked_text_network()[:2]
    torch.manual_seed(0)
    model, owner = build(model_architecture(kind)), Identity(bytes(range(32)), bytes(32))
    options = OPTIONS | {"architecture": model_architecture(kind)}
    result = mtlsign.embed(model, text_task(), identity=owner, **options)
    return model.eval(), result


@cache
def detector_of(kind: str) -> WatermarkDetector:
    return detector_for_kit(marked(kind)[1].kit)


def verdict_on(kind: str, tensors: Tensors) -> Verdict:
    return verify(tensors, detector_of(kind), bits=60)


def independent(kind: str, seed: int) -> Tensors:
    torch.manual_seed(seed)
    return dict(build(model_architecture(kind)).state_dict())


def changed(kind: str, change: str) -> Tensors:
    """Return a marked network after a free change, or with noise on its matrices and all free changes."""
    model, _ = marked(kind)
    if change == "noise and all":
        model = build(model_architecture(kind))
        model.load_state_dict(noisy(marked(kind)[0].state_dict()))
    attacks = {
        "nothing": [],
        "noise": [],
        "noise and all": ["permute_vocabulary", "recurrent_symmetries"]
        if kind == "bilstm"
        else ["permute_vocabulary", "rotate_stream", "attention_symmetries", "permute_channels"],
    }.get(change, [change])
    for attack in attacks:
        model = run(attack, model.eval(), text_task(), seed=1).model
    state = dict(model.state_dict())
    return noisy(state) if change == "noise" else state


def with_further_units(tensors: Tensors, count: int = 5) -> Tensors:
    """Return the tensors of a Bi-LSTM with further units in each direction that nothing reads."""
    result, generator = dict(tensors), torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if ".weight_" in name or ".bias_" in name:
            gates = tensor.unflatten(0, (4, -1))
            rows = 0.1 * torch.randn(4, count, *tensor.shape[1:], generator=generator)
            result[name] = torch.cat([rows, gates], 1).flatten(0, 1)
        if ".weight_hh" in name:
            result[name] = torch.cat([torch.zeros(len(result[name]), count), result[name]], 1)
        elif ".weight_ih" in name and "_l0" not in name:
            halves = [torch.cat([torch.zeros(len(h), count), h], 1) for h in result[name].chunk(2, 1)]
            result[name] = torch.cat(halves, 1)
    return result


def widened(tensors: Tensors, kind: str) -> Tensors:
    """Return the tensors with a further group of heads and twelve further neurons, which have no effect."""
    result, generator = dict(tensors), torch.Generator().manual_seed(5)
    groups = int(str(model_architecture(kind).get("kv_heads", 4)))

    def extended(name: str, count: int, axis: int) -> None:
        shape = list(result[name].shape)
        shape[axis] = count
        rows = 0.1 * torch.randn(shape, generator=generator) if axis == 0 else torch.zeros(shape)
        result[name] = torch.cat([rows, result[name]], axis)

    for name in tensors:
        if name.endswith(("query.weight", "key.weight", "value.weight")):
            extended(name, len(tensors[name]) // groups, 0)
        elif name.endswith("output.weight"):
            extended(name, tensors[name].shape[1] // groups, 1)
        elif name.endswith(("mlp.up.weight", "mlp.gate.weight")):
            extended(name, 12, 0)
        elif name.endswith("mlp.down.weight"):
            extended(name, 12, 1)
    return result


def joined(tensors: Tensors, kind: str, *, by_group: bool) -> Tensors:
    """Return the tensors with one matrix of keys, queries and values for each attention layer."""
    result, groups = dict(tensors), int(str(model_architecture(kind).get("kv_heads", 4)))
    for name in [n for n in tensors if n.endswith("attention.query.weight")]:
        parts = [result.pop(name.replace("query", part)) for part in ("key", "query", "value")]
        if by_group:
            parts = [part.unflatten(0, (groups, -1)) for part in parts]
        joint = torch.cat(parts, 1).flatten(0, 1) if by_group else torch.cat(parts)
        result[name.replace("query", "joint")] = joint
    return result


def model_architecture(kind: str) -> dict[str, object]:
    return text_architecture() if kind == "bilstm" else architecture(kind) | {"embedding": 24}


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("change", ["nothing", "noise", "rotate_stream", "attention_symmetries"])
def test_blocks_with_exchanged_numbers_keep_every_bit(kind: str, change: str) -> None:
    verdict = verdict_on(kind, renumbered(changed(kind, change)))
    assert verdict.accepted and verdict.matches == 128 and verdict.readings <= 3


@ALL_KINDS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["nothing", "noise", "noise and all"])
def test_names_without_meaning_keep_every_bit(kind: str, form: str, change: str) -> None:
    verdict = verdict_on(kind, FORMS[form](changed(kind, change)))
    assert verdict.accepted and verdict.matches == 128 and verdict.readings <= 5, verdict


@pytest.mark.parametrize("kind", ["pre", "rms"])
@pytest.mark.parametrize("by_group", [False, True])
def test_separate_matrices_that_are_stored_as_joint_ones_keep_every_bit(kind: str, by_group: bool) -> None:
    verdict = verdict_on(kind, exchanged(joined(changed(kind, "noise and all"), kind, by_group=by_group)))
    assert verdict.accepted and verdict.matches == 128, verdict


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["nothing", "noise and all"])
def test_matrices_with_further_heads_and_neurons_keep_every_bit(kind: str, form: str, change: str) -> None:
    file = widened(changed(kind, change), kind)
    assert {t.shape for t in file.values()} != {t.shape for t in marked(kind)[0].state_dict().values()}
    verdict = verdict_on(kind, FORMS[form](file))
    assert verdict.accepted and verdict.matches == 128, verdict


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["nothing", "noise and all"])
def test_recurrent_layers_with_further_units_keep_every_bit(form: str, change: str) -> None:
    verdict = verdict_on("bilstm", FORMS[form](with_further_units(changed("bilstm", change))))
    assert verdict.accepted and verdict.matches == 128, verdict


@ALL_KINDS
def test_transposed_matrices_without_names_keep_every_bit(kind: str) -> None:
    state = marked(kind)[0].state_dict()
    file = {n: t.T.contiguous() if t.dim() == 2 and n != "embedding.weight" else t for n, t in state.items()}
    verdict = verdict_on(kind, anonymous(file))
    assert verdict.accepted and verdict.matches == 128


@ALL_KINDS
def test_complete_network_under_its_names_is_not_searched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the file was searched")

    monkeypatch.setattr("mtlsign.watermark.verification.matching.ContentMatcher.views", fail)
    verdict = verdict_on(kind, dict(marked(kind)[0].state_dict()))
    assert verdict.accepted and verdict.readings == 1


@ALL_KINDS
def test_independent_network_with_such_names_gives_no_further_reading(kind: str) -> None:
    for seed in (9, 10):
        state = independent(kind, seed)
        by_name = verdict_on(kind, state)
        others = [verdict_on(kind, exchanged(state))]
        others += [verdict_on(kind, renumbered(state))] if kind != "bilstm" else []
        assert by_name.status == "unrelated" and by_name.readings <= 2
        assert all(v.status == "unrelated" and v.readings <= 2 for v in others)
        verdict = verdict_on(kind, anonymous(state))
        assert verdict.status == "not_verifiable" and verdict.matches == 0


@ALL_KINDS
def test_matches_of_wrong_keys_in_forced_views_are_binomial(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for aligner in (TransformerAligner, RecurrentAligner):
        monkeypatch.setattr(aligner, "exceeds", lambda self, similarity, chance: True)
    detector, counts = detector_of(kind), []
    for seed in range(20):
        views = list(detector._selector().by_content(anonymous(independent(kind, seed)), with_products=True))
        selected = views[-1][0]
        order = next(detector._orders_of(selected, detector.align(selected), False))
        reading = detector._reading(order)
        for index in range(8):  # further keys for each network, because one network's scores are fixed
            other = detector.with_control_key(8 * seed + index)
            counts.append(int(matching_bits(other.score(reading.values).float(), other.labels).sum()))
    matches = torch.tensor(counts, dtype=torch.float64)
    assert abs(float(matches.mean()) - 64) < 4 * (32 / len(counts)) ** 0.5
    assert 0.6 < float(matches.var()) / 32 < 1.5  # standard deviation of the ratio: .11


@pytest.mark.parametrize("kind", ["rms", "bilstm"])
@pytest.mark.parametrize("count", [200, 5000])
def test_decoys_of_fitting_shapes_end_in_bounded_time(kind: str, count: int) -> None:
    state, generator = dict(marked(kind)[0].state_dict()), torch.Generator().manual_seed(1)
    shapes = list(dict.fromkeys(t.shape for t in state.values()))
    decoys = {
        f"d{number}": torch.randn(shapes[number % len(shapes)], generator=generator)
        for number in range(count)
    }
    start = time.process_time()
    verdict = verdict_on(kind, anonymous(state) | decoys)
    assert time.process_time() - start < 30
    if count == 200:
        assert verdict.accepted and verdict.matches >= 120
    else:
        assert verdict.accepted or "Too many tensors" in str(verdict.reason)


def test_huge_numbers_without_names_get_a_verdict() -> None:
    huge = torch.finfo(torch.float32).max
    for kind in ("post", "rms", "bilstm"):
        file = {n: t.sign() * huge if t.dim() > 1 else t for n, t in marked(kind)[0].state_dict().items()}
        for form in FORMS.values():
            verdict = verdict_on(kind, form(file))  # the signs of all numbers can still show a mark
            assert verdict.status in ("accepted", "not_verifiable", "unrelated", "rejected")


def test_missing_tensors_leave_the_others() -> None:
    assert set(KINDS) == set(TRANSFORMERS)
    state = marked("rms")[0].state_dict()
    file = anonymous({n: t for n, t in state.items() if "blocks.1.attention" not in n})
    verdict = verdict_on("rms", file)
    assert verdict.matches > 90 and len(verdict.missing_layers) == 2
