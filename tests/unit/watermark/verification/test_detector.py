"""Tests of Algorithm 1: marked networks, other networks, and tensors that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, KeyMaterialError
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import (
    WatermarkDetector,
    control_accuracies,
    matching_bits,
    signed_scores,
    verify,
)
from mtlsign.watermark.verification.reference import Reference

Tensors = dict[str, Tensor]


Marked = tuple[Tensors, Any]


def accuracy(tensors: Tensors, detector: WatermarkDetector) -> float:
    return verify(tensors, detector).accuracy


def test_verify_accepts_marked_model_and_rejects_others(
    marked_model: Marked, detector: WatermarkDetector, tiny_model: Callable[..., nn.Module]
) -> None:
    base_weights, done = marked_model
    verdict = verify(done.tensors, detector, controls=3, base_weights=base_weights, model_digest="d")
    assert (verdict.status, verdict.accepted, verdict.n, verdict.model_digest) == ("accepted", True, 128, "d")
    assert verdict.matches >= 127 and verdict.evidence_bits == evidence.binomial_evidence_bits(
        verdict.matches, 128
    )
    assert verdict.p_value == 2**-verdict.evidence_bits and verdict.chernoff_bound >= verdict.p_value
    low, high = (k / 128 for k in evidence.control_band(128, 1e-6))
    assert len(verdict.controls["wrong_keys"]) == 3 and len(set(verdict.controls["wrong_keys"])) > 1
    for chance in (
        *verdict.controls["wrong_keys"],
        *verdict.controls["w0"],
        accuracy(base_weights, detector),
    ):
        assert low <= chance <= high
    for other in (tiny_model(11), tiny_model(12)):
        rejected = verify(other.state_dict(), detector)
        assert rejected.status == "rejected" and low <= rejected.accuracy <= high and not rejected.accepted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_verify_accepts_other_precisions_prefixes_and_heads(
    dtype: torch.dtype, marked_model: Marked, detector: WatermarkDetector
) -> None:
    state = {
        f"module.{name}": t.to(dtype) for name, t in marked_model[1].tensors.items() if t.is_floating_point()
    }
    state["module.fc.weight"] = torch.zeros(77, 3)
    assert accuracy(state, detector) >= 0.98


@pytest.mark.parametrize("damage", ["missing", "nan", "inf", "shape", "int", "overflow", "empty"])
def test_verify_of_unmappable_tensors_is_not_verifiable(
    damage: str, marked_model: Marked, detector: WatermarkDetector
) -> None:
    state, name = dict(marked_model[1].tensors), "layer1.1.conv1.weight"
    kernel = state[name].clone()
    value: Any = {
        "nan": kernel.index_fill(0, torch.tensor([0]), float("nan")),
        "inf": kernel.index_fill(0, torch.tensor([0]), float("inf")),
        "shape": kernel[:, :4],
        "int": kernel.to(torch.int8),
        "overflow": kernel.double() * 1e300,
    }.get(damage)
    state = {} if damage == "empty" else {n: t for n, t in state.items() if n != name}
    state |= {} if value is None else {name: value}
    verdict = verify(state, detector, controls=2, base_weights=marked_model[0], model_digest="d")
    assert (verdict.status, verdict.accepted, verdict.matches, verdict.p_value) == (
        "not_verifiable",
        False,
        0,
        1.0,
    )
    assert verdict.reason and verdict.model_digest == "d" and "may still be marked" in verdict.summary()
    json.dumps(verdict.to_json(), allow_nan=False)


def test_verify_of_zero_weights_is_rejected(marked_model: Marked, detector: WatermarkDetector) -> None:
    verdict = verify({n: torch.zeros_like(t) for n, t in marked_model[1].tensors.items()}, detector)
    assert (verdict.status, verdict.matches, verdict.near_zero) == ("rejected", 0, 128)


def test_matching_bits_treats_scores_near_zero_as_wrong() -> None:
    scores = torch.tensor([1.0, -1.0, 5e-5, -5e-5, 1e-4, float("nan")])
    bits = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.uint8)
    assert matching_bits(scores, bits).tolist() == [True, False, False, False, True, False]


def test_verify_applies_policy_of_the_caller(marked_model: Marked, detector: WatermarkDetector) -> None:
    tensors = marked_model[1].tensors
    assert verify(tensors, detector, bits=129).status == "rejected"
    assert verify(tensors, detector, gamma=1.0).passes_gamma == (verify(tensors, detector).matches == 128)
    assert (
        "Accepted" in verify(tensors, detector).summary()
        and "Rejected" in verify(tensors, detector, bits=4000).summary()
    )


def signed_with(marked: Marked, owner: Identity, **changes: object) -> KeyOpening:
    """The same spec with changes, signed again: another key."""
    fields = json.loads(marked[1].kit.opening.spec)
    return sign_spec(owner, make_spec(**(fields | changes)))


def test_verify_with_weighted_statistic_uses_weighted_tail(marked_model: Marked, owner: Identity) -> None:
    """Verify the weighted verdict with labels set to the scores, because another key finds no watermark."""
    kit = marked_model[1].kit
    weighted = WatermarkDetector(
        signed_with(marked_model, owner, statistic="weighted"), Reference.from_bytes(kit.reference)
    )
    chance = verify(marked_model[1].tensors, weighted)
    assert chance.statistic == "weighted" and chance.status == "rejected" and chance.evidence_bits < 25
    scores, _ = weighted.score_state_dict(marked_model[1].tensors)
    assert scores is not None
    weighted.labels = (scores > 0).to(torch.uint8)
    weighted.labels[scores.abs().argsort()[:10]] ^= 1  # the ten least certain bits are wrong
    planted = verify(marked_model[1].tensors, weighted)
    right = matching_bits(scores, weighted.labels)
    expected = evidence.weighted_tail_bits(evidence.score_weights(scores.numpy()), right.numpy())
    assert planted.evidence_bits == expected and planted.matches == int(right.sum()) <= 118
    assert planted.evidence_bits > evidence.binomial_evidence_bits(planted.matches, 128)


def test_verify_with_free_head_needs_commitment(marked_model: Marked, owner: Identity) -> None:
    kit = marked_model[1].kit
    head = {"kind": "free", "hidden": 16, "features": "flat"}
    opening = signed_with(marked_model, owner, head=head)
    detector = WatermarkDetector(opening, Reference.from_bytes(kit.reference))
    optimizer = torch.optim.Adam(detector.head.parameters(), lr=0.02)
    with torch.no_grad():
        features = detector.model.features(
            detector.model.canonicalize(detector.model.select_weights(marked_model[0])), detector.images
        )
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(
            detector.head(features), detector.labels.float()
        )
        loss.backward()
        optimizer.step()
    stored = detector.head.to_bytes()
    again = WatermarkDetector(opening, Reference.from_bytes(kit.reference), head=stored)
    verdict = verify(marked_model[0], again)  # the unmarked network: a trained head fits anything
    assert (verdict.status, verdict.accepted, verdict.matches) == ("needs_commitment", False, 128)
    assert "commitment" in verdict.summary()
    assert verify(marked_model[0], again, bits=200).status == "rejected"


def test_control_accuracies_leave_detector_unchanged(
    marked_model: Marked, detector: WatermarkDetector
) -> None:
    before = verify(marked_model[1].tensors, detector)
    assert control_accuracies(marked_model[1].tensors, detector, 2) == control_accuracies(
        marked_model[1].tensors, detector, 2
    )
    assert verify(marked_model[1].tensors, detector) == before


def test_signed_scores_are_positive_for_matching_bits(
    marked_model: Marked, detector: WatermarkDetector
) -> None:
    found = signed_scores(detector, [marked_model[1].tensors, {}, marked_model[0]])
    assert len(found) == 2 and sum(s > 0 for s in found[0]) >= 127 and 40 < sum(s > 0 for s in found[1]) < 90


def test_detector_with_unfitting_opening_or_reference_raises(marked_model: Marked, owner: Identity) -> None:
    kit = marked_model[1].kit
    reference = Reference.from_bytes(kit.reference)
    with pytest.raises(ArtifactError, match="reference: The reference is not the one"):
        WatermarkDetector(signed_with(marked_model, owner, reference="0" * 64), reference)
    forged = KeyOpening(kit.opening.spec, kit.opening.public_key, bytes(64))
    with pytest.raises(KeyMaterialError):
        WatermarkDetector(forged, reference)


def test_repr_of_results_and_keys_reveals_no_secret(
    marked_model: Marked, detector: WatermarkDetector, owner: Identity
) -> None:
    done = marked_model[1]
    nonce = done.kit.opening.parse().nonce
    shown = "".join(
        map(
            repr,
            (done, done.kit, done.kit.opening, done.verdict, detector, detector.spec, owner, detector.head),
        )
    )
    for secret in (
        nonce,
        detector.key.hex(),
        done.kit.opening.signature.hex(),
        owner.kit_key.hex(),
        repr(detector.key),
    ):
        assert secret not in shown
