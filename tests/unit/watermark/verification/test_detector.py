"""Tests of Algorithm 1: marked networks, other networks, and tensors that cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, KeyMaterialError, SettingsError
from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.algorithm import control_accuracies, signed_scores, verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.scores import matching_bits
from tests.unit.watermark.verification import spread_examples
from tests.unit.watermark.verification.spread_examples import (
    FACTORY,
    KERNELS,
    N,
    example_detector,
    example_reference,
    mark,
    network,
    opening,
)

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
        assert rejected.status == "unrelated" and low <= rejected.accuracy <= high and not rejected.accepted


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
        "int": kernel.to(torch.int32),
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


def test_verify_of_zero_weights_is_unrelated(marked_model: Marked, detector: WatermarkDetector) -> None:
    verdict = verify({n: torch.zeros_like(t) for n, t in marked_model[1].tensors.items()}, detector)
    assert (verdict.status, verdict.matches, verdict.near_zero) == ("unrelated", 0, 128)


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
    scores = weighted.score_state_dict(marked_model[1].tensors).scores
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
    readout = detector.feature_readout
    optimizer = torch.optim.Adam(detector.trained_parameters, lr=0.02)
    with torch.no_grad():
        canonical = readout.model.canonicalize(readout.model.select_weights(marked_model[0]))
        features = readout.model.features(canonical, readout.inputs)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(readout.head(features), detector.labels.float())
        loss.backward()
        optimizer.step()
    stored = detector.head_bytes()
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
            (
                *(done, done.kit, done.kit.opening, done.verdict, detector, detector.spec, owner),
                *(detector.feature_readout, detector.feature_readout.head),
            ),
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


KEYED_READOUT = {"head": {"kind": "keyed"}, "taps": ["2"], "n": N}


@pytest.fixture(scope="module")
def spread() -> WatermarkDetector:
    return example_detector()


@pytest.fixture(scope="module")
def spread_marked(spread: WatermarkDetector) -> Tensors:
    """Tensors of W0, changed so that the spread detector accepts them."""
    return mark(network().state_dict(), spread)


def test_verify_with_spread_head_accepts_marked_model_and_rejects_others(
    spread: WatermarkDetector, spread_marked: Tensors
) -> None:
    base_weights = network().state_dict()
    verdict = verify(spread_marked, spread, controls=3, base_weights=base_weights)
    assert (verdict.status, verdict.accepted, verdict.n, verdict.missing_layers) == ("accepted", True, N, ())
    assert verdict.matches >= 126 and "missing_layers" not in verdict.to_json()
    low, high = (k / N for k in evidence.control_band(N, 1e-6))
    for chance in (*verdict.controls["wrong_keys"], *verdict.controls["w0"]):
        assert low <= chance <= high
    for seed, status in ((0, "rejected"), (4, "unrelated")):  # W0 itself, and an independent network
        other = verify(network(seed).state_dict(), spread)
        assert other.status == status and low <= other.accuracy <= high


def test_spread_matches_of_unmarked_network_are_near_half_over_random_keys(
    spread: WatermarkDetector,
) -> None:
    """With random labels the number of matches over 40 keys is binomial."""
    state, matches = network(4).state_dict(), 0
    for index in range(40):
        control = spread.with_control_key(index)
        scores = control.score_state_dict(state).scores
        assert scores is not None
        matches += int(matching_bits(scores, control.labels).sum())
    low, high = evidence.control_band(40 * N, 1e-6)
    assert low <= matches <= high


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_spread_scores_of_other_precisions_and_prefixes_agree(
    dtype: torch.dtype, spread: WatermarkDetector, spread_marked: Tensors
) -> None:
    expected = spread.score_state_dict(spread_marked).scores
    state = {f"module.{n}": t.to(dtype) for n, t in spread_marked.items() if t.is_floating_point()}
    result = spread.score_state_dict(state)
    assert expected is not None and result.scores is not None and result.missing == ()
    assert expected.dtype == result.scores.dtype == torch.float64
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 0.1, torch.float64: 0.0}[dtype]
    torch.testing.assert_close(result.scores, expected, rtol=0, atol=tolerance)
    assert verify(state, spread).status == "accepted"


def damaged(kernel: Tensor, damage: str) -> Tensor | None:
    return {
        "missing": None,
        "nan": kernel.flatten().index_fill(0, torch.tensor([0]), float("nan")).reshape(kernel.shape),
        "shape": kernel[:-1],
        "int": kernel.to(torch.int32),
        "overflow": kernel.double() * 1e300,
    }[damage]


@pytest.mark.parametrize("damage", ["missing", "nan", "shape", "int", "overflow"])
def test_verify_with_spread_head_lists_missing_layers_and_never_rejects(
    damage: str, spread: WatermarkDetector, spread_marked: Tensors
) -> None:
    def without(state: Tensors, *names: str) -> Tensors:
        values = {name: damaged(state[name], damage) for name in names}
        return {n: values.get(n, t) for n, t in state.items() if n not in names or values[n] is not None}  # type: ignore[misc]

    verdict = verify(without(spread_marked, "6.weight"), spread)
    assert verdict.accepted and verdict.missing_layers == ("6.weight",) and verdict.matches >= 120
    assert verdict.to_json()["missing_layers"] == ["6.weight"] and verdict.reason is None
    for names in (("6.weight",), KERNELS[1:], KERNELS[:-1]):
        unmarked = verify(without(network(4).state_dict(), *names), spread)
        assert (unmarked.status, unmarked.accepted) == ("not_verifiable", False)
        assert unmarked.missing_layers == names and unmarked.n == N and unmarked.matches < 98
        assert unmarked.reason is not None and f"{len(names)} of 6 layers are missing" in unmarked.reason
        assert names[0] in unmarked.reason and "may still be marked" in unmarked.summary()
        json.dumps(unmarked.to_json(), allow_nan=False)
    nothing = verify(without(network(4).state_dict(), *KERNELS), spread)
    assert (nothing.status, nothing.matches, nothing.p_value) == ("not_verifiable", 0, 1.0)
    assert nothing.reason


def test_spread_scores_of_missing_layer_equal_those_of_zero_kernel(
    spread: WatermarkDetector, spread_marked: Tensors
) -> None:
    zero = {**spread_marked, "13.weight": torch.zeros_like(spread_marked["13.weight"])}
    missing = {name: t for name, t in spread_marked.items() if name != "13.weight"}
    expected, found = spread.score_state_dict(zero), spread.score_state_dict(missing)
    assert expected.scores is not None and found.scores is not None
    assert torch.equal(found.scores, expected.scores)
    assert (expected.missing, found.missing) == ((), ("13.weight",))


def test_verify_of_zero_weights_with_spread_head_is_unrelated(spread: WatermarkDetector) -> None:
    verdict = verify({n: torch.zeros_like(t) for n, t in network().state_dict().items()}, spread)
    assert (verdict.status, verdict.matches, verdict.near_zero) == ("unrelated", 0, N)


def test_spread_detector_from_bytes_gives_equal_scores(
    spread: WatermarkDetector, spread_marked: Tensors
) -> None:
    key_opening = KeyOpening.from_json(opening().to_json())
    reference = Reference.from_bytes(bytes(example_reference().raw_bytes))
    again = WatermarkDetector(key_opening, reference, factories={FACTORY: lambda: network(2).train()})
    expected, found = spread.score_state_dict(spread_marked), again.score_state_dict(spread_marked)
    assert expected.scores is not None and found.scores is not None
    assert torch.equal(found.scores, expected.scores) and torch.equal(again.labels, spread.labels)
    assert again.head_bytes() is None and again.trained_parameters == []


def test_spread_training_path_agrees_with_verification_near_w0(spread: WatermarkDetector) -> None:
    state = mark(network().state_dict(), spread, steps=1, size=0.02)
    kernels = spread.select_weights(state)
    trained = spread.score_kernels(kernels, differentiable=True)
    verified = spread.score_kernels(kernels)
    assert trained.dtype == torch.float32
    torch.testing.assert_close(trained.double(), verified, rtol=0, atol=1e-3)


def test_further_keyed_readout_adds_its_bits(spread: WatermarkDetector, spread_marked: Tensors) -> None:
    both = example_detector(readouts=[KEYED_READOUT])
    assert both.spec.total_bits == 2 * N == len(both.labels) and len(both.readouts) == 2
    assert not both.spec.has_trained_head
    marked = mark(network().state_dict(), both, steps=40)
    verdict = verify(marked, both, controls=2, bits=100)
    assert verdict.status == "accepted" and verdict.n == 2 * N
    result = both.score_state_dict(marked)
    assert result.scores is not None and len(result.scores) == 2 * N
    first, second = both.readouts
    kernels = both.select_weights(marked)
    assert torch.equal(result.scores[:N], first.score(first.read(kernels)))
    torch.testing.assert_close(result.scores[N:], second.score(second.read(kernels)))
    matching = matching_bits(result.scores, both.labels)
    assert verdict.matches == int(matching.sum()) and int(matching[:N].sum()) > 110
    bits = evidence.binomial_evidence_bits(verdict.matches, 2 * N) - math.log2(verdict.readings)
    assert verdict.evidence_bits == pytest.approx(bits)
    assert verify(network(4).state_dict(), both).status == "unrelated"
    # The key depends on the spec, so that another list of read-outs is another key.
    assert both.key != spread.key and not verify(spread_marked, both).accepted


def test_further_keyed_readout_needs_its_own_kernels() -> None:
    both = example_detector(readouts=[KEYED_READOUT])
    state = network(4).state_dict()
    tolerated = {name: t for name, t in state.items() if name != "9.weight"}
    assert both.score_state_dict(tolerated).missing == ("9.weight",)
    required = {name: t for name, t in state.items() if name != "0.weight"}
    result = both.score_state_dict(required)
    assert result.scores is None and result.problem is not None
    assert verify(required, both).status == "not_verifiable"


def test_spread_detector_has_no_feature_readout(
    spread: WatermarkDetector, detector: WatermarkDetector
) -> None:
    with pytest.raises(SettingsError, match="head: The key has no read-out of features"):
        _ = spread.feature_readout
    assert detector.feature_readout is detector.readouts[0]


def test_joined_detector_has_readouts_of_every_key(spread: WatermarkDetector) -> None:
    openings = [opening(nonce=digits * 32) for digits in ("ab", "cd", "ef")]
    factories = {FACTORY: lambda: network(9)}
    joined = WatermarkDetector.joined(openings, example_reference(), factories=factories)
    assert len(joined.readouts) == 3 and len(joined.labels) == 3 * N
    assert len({id(readout.model) for readout in joined.readouts}) == 1, "the model is shared"
    state = network().state_dict()
    scores = joined.score_state_dict(state).scores
    assert scores is not None
    for key_opening, part, bits in zip(openings, scores.split(N), joined.labels.split(N), strict=True):
        single = WatermarkDetector(key_opening, example_reference(), factories=factories)
        expected = single.score_state_dict(state).scores
        assert expected is not None
        assert torch.equal(part, expected) and torch.equal(bits, single.labels)


def test_joined_detector_of_one_key_equals_its_detector(spread: WatermarkDetector) -> None:
    joined = WatermarkDetector.joined(
        [opening()], example_reference(), factories={FACTORY: lambda: network(9)}
    )
    assert torch.equal(joined.labels, spread.labels) and joined.key == spread.key


def test_spread_detector_with_more_bits_than_coordinates_raises() -> None:
    with pytest.raises(ArtifactError, match="fewer than the 4,096 bits"):
        example_detector(n=4096, carrier=make_carrier(4096, 1, 21, 21))


def test_joined_detector_of_two_keys_has_all_bits_and_no_control_keys() -> None:
    openings = [spread_examples.opening(nonce=digits * 32) for digits in ("ab", "cd")]
    factories = {spread_examples.FACTORY: lambda: spread_examples.network(9)}
    joined = WatermarkDetector.joined(openings, spread_examples.example_reference(), factories=factories)
    alone = WatermarkDetector(openings[1], spread_examples.example_reference(), factories=factories)
    assert torch.equal(joined.labels[spread_examples.N :], alone.labels)
    assert verify(spread_examples.network(4).state_dict(), joined).n == 2 * spread_examples.N
    with pytest.raises(ValueError, match="several keys"):
        joined.with_control_key(0)
