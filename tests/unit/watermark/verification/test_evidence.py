"""Tests of evidence: exact tails against brute force, bounds against tails, and quoted numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.watermark.verification import evidence


def exact(k: int, n: int) -> Fraction:
    return Fraction(sum(math.comb(n, i) for i in range(max(k, 0), n + 1)), 2**n)


def test_evidence_equals_numbers_quoted_in_paper_and_documents() -> None:
    assert evidence.binomial_evidence_bits(420, 600) == pytest.approx(75.242, abs=5e-4)
    assert math.log10(evidence.p_value(evidence.binomial_evidence_bits(420, 600))) == pytest.approx(
        -22.65, abs=5e-3
    )
    assert (evidence.threshold(600, 120), evidence.threshold(1024, 120)) == (452, 712)
    assert evidence.chernoff_bound_paper(0.7, p=0.575, n=600, lam=0.34) == pytest.approx(3.37e-8, rel=2e-3)
    assert evidence.binomial_evidence_bits(1024, 1024) == 1024.0 and evidence.p_value(1024.0) == 2.0**-1024


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 60])
def test_binomial_evidence_bits_are_exact(n: int) -> None:
    for k in range(-1, n + 2):
        expected = exact(k, n)
        found = evidence.binomial_evidence_bits(k, n)
        assert found >= 0.0 and math.copysign(1.0, found) == 1.0
        if expected == 0:
            assert found == math.inf and evidence.p_value(found) == 0.0
        else:
            assert evidence.p_value(found) == pytest.approx(float(expected), rel=1e-13)


def test_binomial_evidence_bits_near_certainty_keep_precision() -> None:
    assert evidence.binomial_evidence_bits(1, 100) == pytest.approx(2.0**-100 / math.log(2), rel=1e-12)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 700), st.data())
def test_evidence_bits_are_monotone_and_bounded_by_chernoff(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    bits = evidence.binomial_evidence_bits(k, n)
    assert evidence.chernoff_bits(k, n) <= bits + 1e-9 and evidence.chernoff_bound(k, n) <= 1.0
    assert evidence.binomial_evidence_bits(k + 1, n) > bits or bits < 1e-9
    lam = data.draw(st.floats(0, 20))
    assert evidence.chernoff_bound_paper(k / n, 0.5, n, lam) >= evidence.chernoff_bound(k, n) * (1 - 1e-9)
    if n / 2 < k < n:
        best = math.log(k / (n - k))
        assert evidence.chernoff_bound_paper(k / n, 0.5, n, best) == pytest.approx(
            evidence.chernoff_bound(k, n), rel=1e-9
        )


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 400), st.floats(0, 420))
def test_threshold_is_smallest_sufficient_count(n: int, bits: float) -> None:
    k = evidence.threshold(n, bits)
    assert evidence.binomial_evidence_bits(k, n) >= bits
    assert k == 0 or evidence.binomial_evidence_bits(k - 1, n) < bits
    assert (k == n + 1) == (bits > n)


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.01, 2.0**-20, 1e-300])
@pytest.mark.parametrize("n", [1, 2, 7, 600])
def test_control_band_leaves_at_most_alpha_outside(n: int, alpha: float) -> None:
    low, high = evidence.control_band(n, alpha)
    assert 0 <= low <= high <= n and low + high == n
    outside = 2 * exact(high + 1, n)
    assert outside <= Fraction(alpha)
    if high > 0:
        assert 2 * exact(high, n) > Fraction(alpha)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.booleans()), min_size=1, max_size=11))
def test_weighted_tail_bits_equal_brute_force(pairs: list[tuple[int, bool]]) -> None:
    weights, correct = [w for w, _ in pairs], [c for _, c in pairs]
    observed = sum(w for w, c in pairs if c)
    n = len(pairs)
    as_good = sum(
        sum(w for w, bit in zip(weights, coins, strict=True) if bit) >= observed
        for coins in itertools.product((0, 1), repeat=n)
    )
    found = evidence.weighted_tail_bits(np.array(weights), np.array(correct))
    assert found == pytest.approx(n - math.log2(as_good), abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 64, 601])
def test_weighted_tail_bits_with_equal_weights_equal_binomial(n: int) -> None:
    for weight in (1, 15):
        for k in {0, n // 3, n // 2, (3 * n) // 4, n}:
            correct = np.arange(n) < k
            assert evidence.weighted_tail_bits(
                np.full(n, weight), correct
            ) == evidence.binomial_evidence_bits(k, n)


def test_weighted_tail_bits_at_full_size_equal_dynamic_programme() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=1024).astype(np.float32)
    weights = evidence.score_weights(scores)
    correct = rng.random(1024) < 0.75
    table = [1]  # the plain dynamic programme
    for weight in weights[:200].tolist():
        shifted = [0] * weight + table
        table = [a + b for a, b in itertools.zip_longest(table, shifted, fillvalue=0)]
    observed = int(weights[:200][correct[:200]].sum())
    expected = 200 - math.log2(sum(table[observed:]))
    assert evidence.weighted_tail_bits(weights[:200], correct[:200]) == pytest.approx(expected, abs=1e-10)
    mean, variance = weights.sum() / 2, (weights.astype(float) ** 2).sum() / 4
    bits = evidence.weighted_tail_bits(weights, correct)
    z = (weights[correct].sum() - mean) / math.sqrt(variance)
    assert bits == pytest.approx(-math.log2(0.5 * math.erfc(z / math.sqrt(2))), rel=0.1)


def test_score_weights_depend_on_magnitudes_only() -> None:
    scores = np.array([0.0, 1.0, -1.0, 2.0, -100.0, float("nan"), float("inf")], dtype=np.float32)
    weights = evidence.score_weights(scores)
    assert weights.dtype == np.int64 and weights[1] == weights[2] and weights[4] == 15
    assert weights[0] == weights[5] == weights[6] == 0
    assert np.array_equal(evidence.score_weights(-scores), weights)
    assert evidence.score_weights(np.ones(4)).tolist() == [8] * 4
    assert evidence.score_weights(np.zeros(4)).tolist() == [0] * 4
    assert evidence.weighted_tail_bits(np.zeros(4, int), np.ones(4, bool)) == 0.0


def test_evidence_functions_refuse_invalid_arguments() -> None:
    for call in (
        lambda: evidence.binomial_evidence_bits(1, 0),
        lambda: evidence.binomial_evidence_bits(1, 10**6),
        lambda: evidence.threshold(0, 1.0),
        lambda: evidence.control_band(10, 0.0),
        lambda: evidence.control_band(10, 1.0),
        lambda: evidence.chernoff_bound_paper(2, 0.5, 9, 1),
        lambda: evidence.weighted_tail_bits([1, 2], [True]),
        lambda: evidence.weighted_tail_bits([16], [True]),
        lambda: evidence.weighted_tail_bits([-1], [True]),
        lambda: evidence.weighted_tail_bits([1.0], [True]),
        lambda: evidence.weighted_tail_bits([1], [1]),
        lambda: evidence.weighted_tail_bits(np.zeros(0, int), np.zeros(0, bool)),
    ):
        with pytest.raises(ValueError):
            call()
    assert evidence.chernoff_bits(11, 10) == math.inf and evidence.chernoff_bits(5, 10) == 0.0
    assert evidence.threshold(10, 11) == 11 and evidence.threshold(10, 0) == 0
