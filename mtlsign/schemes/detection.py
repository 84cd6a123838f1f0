"""Detections of all schemes in one unit: the exact binomial tail at the scheme's null rate, in bits."""

from __future__ import annotations

import math

from mtlsign.schemes.base import Detection
from mtlsign.watermark.verification.evidence import MAX_N, binomial_evidence_bits

#: Evidence from which the comparators accept a claim by default, 2^-40 for a random key. Some published
#: keys are too short for the policy of MTLSign.
DEFAULT_EVIDENCE_BITS = 40.0


def tail_bits(matched: int, n: int, null_rate: float) -> float:
    """Return -log2 P(X >= matched) for X ~ Binomial(n, null_rate).

    Args:
        matched: matches, from 0 to n.
        n: trials.
        null_rate: probability of one match, over 0 and under 1.

    Returns:
        Evidence in bits. The sum is exact for a null rate of one half, otherwise correct to about 1e-9.

    Raises:
        ValueError: an argument is outside its limits.
    """
    if not 1 <= n <= MAX_N or not 0 <= matched <= n or not 0 < null_rate < 1:
        raise ValueError(f"need 0 <= matched <= n <= {MAX_N} and a null rate over 0 and under 1")
    if null_rate == 0.5:
        return binomial_evidence_bits(matched, n)
    if matched == 0:
        return 0.0
    log_hit, log_miss = math.log(null_rate), math.log1p(-null_rate)
    logs = [_log_binomial(n, k) + k * log_hit + (n - k) * log_miss for k in range(matched, n + 1)]
    largest = max(logs)
    total = largest + math.log(math.fsum(math.exp(value - largest) for value in logs))
    return max(0.0, -total / math.log(2))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def detection_of(matched: int, n: int, null_rate: float, min_evidence_bits: float) -> Detection:
    """Return the detection of so many matches.

    Args:
        matched: matches.
        n: trials.
        null_rate: probability of one match with a random key.
        min_evidence_bits: evidence from which the claim is accepted.
    """
    bits = tail_bits(matched, n, null_rate)
    accepted = bits >= min_evidence_bits
    return Detection(matched, n, bits, accepted, "accepted" if accepted else "rejected", null_rate=null_rate)


def unreadable(n: int, null_rate: float, reason: str) -> Detection:
    """Return the detection of a model that lacks what the key reads.

    Args:
        n: trials of the key.
        null_rate: probability of one match with a random key.
        reason: a sentence.
    """
    return Detection(0, n, 0.0, False, "not_verifiable", reason, null_rate)
