"""Keyed and free heads on networks of recurrent layers, and attacks on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mtlsign
from mtlsign.attacks import AttackerResources
from mtlsign.attacks.decorrelation import decorrelate
from mtlsign.errors import ArtifactError
from mtlsign.models.architectures import default_taps
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.spec import WordCarrierSpec
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.compute_budget import check_claim_budget
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.readouts import require_known_words
from mtlsign.watermark.verification.reference import Reference
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import (
    marked_text_network,
    text_architecture,
    text_network,
    text_task,
)

HEADS: dict[str, dict[str, Any]] = {
    "keyed": {"preset": "keyed", "lambda2": 1.0, "phase2.steps": 100, "phase2.lr": 0.01},
    "free": {"preset": "paper", "lambda1": 0.001, "lambda2": 0.1, "phase2.steps": 100, "phase2.lr": 0.01},
}
#: Attacks, and the bits of 128 that each leaves at least.
FEWEST = {
    "ftal:epochs=1,batch=32,lr=0.001": 115, "prune:ratio=0.3": 115, "prune_channels:ratio=0.1": 115,
    "fine_prune_channels:ratio=0.1,epochs=1,batch=32": 115, "int8": 125, "recurrent_symmetries": 128,
    "permute_vocabulary": 128, "recurrent_symmetries+permute_vocabulary": 128,
    "overwrite:epochs=2,n=128,images=16": 115, "spoil:steps=3,batch=16": 115,
    "decorrelate:steps=2,codes=16,batch=16": 115,
}  # fmt: skip


def marked(head: str) -> tuple[nn.Module, EmbeddingResult]:
    model, result, _ = marked_text_network(**HEADS[head])
    return model, result


@pytest.mark.parametrize("head", sorted(HEADS))
def test_embedding_is_read_by_verifier_without_owner(head: str) -> None:
    model, result = marked(head)
    assert result.kit.opening.parse().taps == ("encoder",)
    detector = detector_for_kit(result.kit, None)
    verdict = verify(model.state_dict(), detector, bits=60)
    assert verdict.status == ("accepted" if head == "keyed" else "needs_commitment")
    assert verdict.matches == result.verdict.matches >= 120
    if head == "keyed":
        assert abs(result.verdict.controls["w0"][0] - 0.5) < 0.2
        assert verify(text_network(seed=5).state_dict(), detector).status == "unrelated"


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("text", sorted(FEWEST))
def test_attack_leaves_bits(text: str, head: str) -> None:
    model, result = marked(head)
    detector = detector_for_kit(result.kit, None)
    outcome = run(text, model, text_task(), seed=1, key=MTLSignKey(detector))
    verdict = verify(outcome.model.state_dict(), detector)
    assert verdict.status != "not_verifiable"
    assert verdict.matches >= min(FEWEST[text], result.verdict.matches)


@pytest.mark.parametrize("name", ["lstm", "gru", "bigru"])
def test_symmetries_of_other_cells_leave_every_bit(name: str) -> None:
    model = text_network(name)
    options = {**HEADS["keyed"], "key_size": 128, "phase1.epochs": 1, "phase2.steps": 12, "phase2.batch": 16}
    result = mtlsign.embed(
        model, text_task(), identity=Identity.generate(), architecture=text_architecture(name), **options
    )
    detector = detector_for_kit(result.kit, None)
    changed = run("recurrent_symmetries", model.eval(), text_task(), seed=2).model
    unchanged, verdict = verify(model.state_dict(), detector), verify(changed.state_dict(), detector)
    assert verdict.matches == unchanged.matches and verdict.readings == 2


def test_vectors_of_a_tuned_embedding_are_replaced_by_those_of_w0() -> None:
    """Word vectors of an attacker that are unlike W0's change the scores through the frame alone."""
    model, result = marked("keyed")
    detector = detector_for_kit(result.kit, None)
    state = copy.deepcopy(model.state_dict())
    state["embedding.weight"] = state["embedding.weight"] * 2
    state["encoder.rnn.weight_ih_l0"] /= 2
    state["encoder.rnn.weight_ih_l0_reverse"] /= 2
    assert verify(state, detector).matches == result.verdict.matches
    del state["embedding.weight"]
    verdict = verify(state, detector)
    assert verdict.status == "not_verifiable" and not verdict.accepted


def test_file_with_vocabulary_of_another_size_is_read() -> None:
    model, result = marked("keyed")
    state = copy.deepcopy(model.state_dict())
    state["embedding.weight"] = torch.cat([state["embedding.weight"], torch.zeros(5, 8)])
    assert verify(state, detector_for_kit(result.kit, None)).matches == result.verdict.matches


def test_decorrelation_needs_no_key_on_texts() -> None:
    model, _ = marked("keyed")
    outcome = decorrelate(model, text_task(), AttackerResources(), 0, steps=1, codes=8, batch=8)
    before = model.state_dict()
    assert any(not torch.equal(t, before[n]) for n, t in outcome.model.state_dict().items())


def test_several_readouts_share_one_network_of_texts() -> None:
    model, result, _ = marked_text_network(readouts="keyed", **{"phase2.steps": 60})
    detector = detector_for_kit(result.kit, None)
    changed = run("recurrent_symmetries", model, text_task(), seed=4).model
    assert result.verdict.n == 256
    assert verify(changed.state_dict(), detector).matches == result.verdict.matches


def test_budget_counts_recurrent_layers_on_all_key_sequences() -> None:
    spec = marked("keyed")[1].kit.opening.parse()
    length, hidden, inputs = 8, 16, 8
    directions, gates, operations = 2, 4, 2
    products = directions * gates * hidden * (inputs + hidden) * operations * length * spec.n
    assert check_claim_budget(spec) * 1e9 >= products


def test_reference_with_fewer_words_than_the_carrier_is_refused() -> None:
    result = marked("keyed")[1]
    reference = Reference.from_bytes(result.kit.reference)
    spec = result.kit.opening.parse()
    carrier = spec.carrier
    assert isinstance(carrier, WordCarrierSpec) and carrier.base == 78
    model = ConvVerifierModel(text_network(), ("encoder",), reference, torch.ones(2, 8, dtype=torch.int64))
    assert model.known_ids == 80
    require_known_words(spec, model)
    with pytest.raises(ArtifactError, match="vectors of 80 ids"):
        require_known_words(replace(spec, carrier=replace(carrier, base=79)), model)


def test_default_taps_of_texts_are_the_recurrent_layers() -> None:
    sample = torch.ones(2, 8, dtype=torch.int64)
    for kind in ("spread", "keyed", "free"):
        assert default_taps(text_network(), kind, sample) == ("encoder",)  # type: ignore[arg-type]
