"""Tests of heads: derived from the key, or trained and stored."""

from __future__ import annotations

import pytest
import torch

from mtlsign.errors import ArtifactError, MTLSignError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.opening import head_signs, spread_order
from mtlsign.watermark.verification.features import Features
from mtlsign.watermark.verification.heads import KeyDerivedHead, SpreadHead, TrainedHead

KEY = bytes(range(32))


FEATURES = Features.from_taps(torch.randn(10, 12, generator=torch.Generator().manual_seed(0)))


def test_key_derived_head_scores_equal_formula() -> None:
    p = torch.from_numpy(head_signs(KEY, 12)).float() / 12**0.5
    torch.testing.assert_close(KeyDerivedHead(KEY, 12)(FEATURES), FEATURES.standardised @ p)
    other = KeyDerivedHead(bytes(32), 12)(FEATURES)
    assert not torch.allclose(other, KeyDerivedHead(KEY, 12)(FEATURES), atol=0.01)


def test_key_derived_head_has_no_parameters_and_no_bytes() -> None:
    head = KeyDerivedHead(KEY, 12)
    assert head.parameters() == [] and head.to_bytes() is None and head.pooled is False


def test_key_derived_head_ignores_constant_coordinates() -> None:
    flat = torch.randn(10, 12)
    flat[:, 3] = 7.0
    without = flat.clone()
    without[:, 3] = 100.0
    head = KeyDerivedHead(KEY, 12)
    assert torch.equal(head(Features.from_taps(flat)), head(Features.from_taps(without)))


def test_trained_head_is_two_layer_perceptron_and_round_trips() -> None:
    head = TrainedHead(12, 5, pooled=True, seed=3)
    w1, b1, w2, b2 = head.parameters()
    with torch.no_grad():
        b1.uniform_(-1, 1)
        b2.fill_(0.25)
    expected = torch.relu(FEATURES.standardised @ w1.T + b1) @ w2 + b2
    torch.testing.assert_close(head(FEATURES), expected)
    again = TrainedHead.from_bytes(head.to_bytes(), 12, 5, pooled=True)
    assert torch.equal(again(FEATURES), head(FEATURES)) and again.pooled
    assert {name: t.shape for name, t in parse_safetensors(head.to_bytes()).items()} == {
        "w1": (5, 12), "b1": (5,), "w2": (5,), "b2": (),
    }  # fmt: skip
    assert torch.equal(
        TrainedHead(12, 5, pooled=False, seed=3)(FEATURES), TrainedHead(12, 5, pooled=False, seed=3)(FEATURES)
    )
    assert not torch.equal(
        TrainedHead(12, 5, pooled=False, seed=4)(FEATURES), TrainedHead(12, 5, pooled=False, seed=3)(FEATURES)
    )


def test_trained_head_from_unfitting_bytes_raises() -> None:
    head = TrainedHead(12, 5, pooled=False)
    good = parse_safetensors(head.to_bytes())
    for bad in (
        {n: t for n, t in good.items() if n != "b2"},
        good | {"w1": torch.zeros(5, 11)},
        good | {"w2": torch.full((5,), float("inf"))},
    ):
        with pytest.raises(ArtifactError, match="head: Tensor"):
            TrainedHead.from_bytes(serialize_safetensors(bad), 12, 5, pooled=False)
    with pytest.raises(MTLSignError):
        TrainedHead.from_bytes(b"\x80\x04.", 12, 5, pooled=False)


def test_trained_head_of_wrong_size_is_refused_before_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec of a claimant may name 1,024 units over 2^28 features, and its head may have 68 bytes."""
    monkeypatch.setattr(TrainedHead, "__init__", lambda *args, **options: pytest.fail("allocated"))
    data = serialize_safetensors({"w1": torch.zeros(1, 1)})
    with pytest.raises(ArtifactError, match="head: Tensor 'w1' does not fit"):
        TrainedHead.from_bytes(data, 2**28, 1024, pooled=False)


def test_spread_head_scores_are_signed_sums_of_groups_in_key_order() -> None:
    responses = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order, signs = spread_order(KEY, 1000), head_signs(KEY, 1000)
    expected = [
        sum(float(signs[i]) * float(responses[order[i]]) for i in range(7 * b, 7 * b + 7)) / 7**0.5
        for b in range(128)
    ]
    scores = SpreadHead(KEY, 1000, 128)(responses)
    assert scores.dtype == torch.float64 and scores.tolist() == pytest.approx(expected, abs=1e-12)
    single = SpreadHead(KEY, 1000, 128)(responses.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), scores, rtol=0, atol=1e-5)
    assert not torch.allclose(SpreadHead(bytes(32), 1000, 128)(responses), scores, atol=0.01)


def test_spread_head_reads_each_coordinate_at_most_once() -> None:
    head = SpreadHead(KEY, 1000, 128)
    jacobian = torch.autograd.functional.jacobian(head, torch.zeros(1000, dtype=torch.float64))
    assert ((jacobian != 0).sum(0) <= 1).all() and ((jacobian != 0).sum(1) == 7).all()
    torch.testing.assert_close(jacobian @ jacobian.T, torch.eye(128, dtype=torch.float64))


def test_spread_head_with_fewer_coordinates_than_bits_raises() -> None:
    assert SpreadHead(KEY, 128, 128)(torch.ones(128)).abs().tolist() == [1.0] * 128
    with pytest.raises(ArtifactError, match=r"key_size: .*127 coordinates, fewer than the 128 bits"):
        SpreadHead(KEY, 127, 128)
