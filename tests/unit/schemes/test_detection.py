from __future__ import annotations

import math
from fractions import Fraction

import pytest

from mtlsign.schemes.detection import detection_of, tail_bits, unreadable
from mtlsign.watermark.verification.evidence import binomial_evidence_bits


@pytest.mark.parametrize(
    ("matched", "n", "rate"), [(7, 10, 0.1), (100, 100, 0.1), (3, 20, 0.25), (1, 5, 0.9)]
)
def test_tail_bits_equals_sum_of_fractions(matched: int, n: int, rate: float) -> None:
    p = Fraction(rate)
    exact = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(matched, n + 1))
    bits = math.log2(exact.denominator) - math.log2(exact.numerator)
    assert tail_bits(matched, n, rate) == pytest.approx(bits, abs=1e-9)


def test_tail_bits_of_fair_coins_is_that_of_verifier() -> None:
    assert tail_bits(712, 1024, 0.5) == binomial_evidence_bits(712, 1024)
    assert tail_bits(0, 10, 0.1) == 0.0


@pytest.mark.parametrize("arguments", [(5, 4, 0.5), (-1, 4, 0.5), (1, 0, 0.5), (1, 4, 0.0), (1, 4, 1.0)])
def test_tail_bits_outside_limits_raises(arguments: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="need 0 <= matched"):
        tail_bits(*arguments)


def test_detection_compares_evidence_with_policy() -> None:
    accepted, rejected = (detection_of(90, 100, 0.5, bits) for bits in (40.0, 80.0))
    assert (accepted.accepted, accepted.status, accepted.null_rate) == (True, "accepted", 0.5)
    assert (rejected.accepted, rejected.status) == (False, "rejected")
    assert accepted.evidence_bits == rejected.evidence_bits
    lost = unreadable(100, 0.1, "No weight.")
    assert (lost.status, lost.reason, lost.evidence_bits) == ("not_verifiable", "No weight.", 0.0)
