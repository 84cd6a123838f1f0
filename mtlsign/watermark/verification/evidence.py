"""Evidence of matching bits: exact tails, bounds and thresholds (docs/decisions/0006; paper, Appendix A).

For a key fixed before the suspect, the number of matches is exactly Binomial(n, ½) for any suspect.
Tails are counted in integers and reported in bits, -log2 of the probability. Bits are authoritative, because
a p-value underflows.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MAX_N = 16384
MAX_WEIGHT = 15


def _bits_from_count(count: int, n: int) -> float:
    """Return -log2(count / 2^n), exact to a few units in the last place at both ends."""
    if count <= 0:
        return math.inf
    if 2 * count <= 1 << n:
        return n - math.log2(count)
    return -math.log1p(-(((1 << n) - count) / (1 << n))) / math.log(2) + 0.0


def _check_n(n: int) -> None:
    if not 1 <= n <= MAX_N:
        raise ValueError(f"n must be from 1 to {MAX_N}, got {n}")


def binomial_evidence_bits(k: int, n: int) -> float:
    """Return -log2 P(X ≥ k) for X ~ Binomial(n, ½), from exact integers: 0 for k ≤ 0, infinite for k > n."""
    _check_n(n)
    if k <= 0:
        return 0.0
    if k > n:
        return math.inf
    low = 2 * k <= n  # count the shorter side
    first, last = (0, k) if low else (k, n + 1)
    term = math.comb(n, first)
    total = 0
    for i in range(first, last):
        total += term
        term = term * (n - i) // (i + 1)
    return _bits_from_count((1 << n) - total if low else total, n)


def p_value(bits: float) -> float:
    """Return 2^-bits; 0.0 beyond about 1,074 bits, so bits are the authoritative form."""
    return math.pow(2.0, -bits)


def chernoff_bits(k: int, n: int) -> float:
    """Return -log2 of `chernoff_bound`: n·(1 - H2(k/n)) for k > n/2, else 0."""
    _check_n(n)
    if k > n:
        return math.inf
    if 2 * k <= n:
        return 0.0
    gamma = k / n
    rest = 1.0 - gamma
    return n * (1.0 + gamma * math.log2(gamma) + (rest * math.log2(rest) if rest else 0.0))


def chernoff_bound(k: int, n: int) -> float:
    """Return the paper's bound on P(X ≥ k) for p = ½ and the best λ (Appendix A); at least the exact tail."""
    return p_value(chernoff_bits(k, n))


def chernoff_bound_paper(gamma: float, p: float, n: int, lam: float) -> float:
    """Return ((1 - p + p·e^λ)/e^(γλ))^n, the paper's Appendix A as printed, but at most 1.

    Args:
        gamma: accuracy, 0 to 1.
        p: chance of one match, 0 to 1.
        n: number of bits.
        lam: λ, 0 to 100.

    Raises:
        ValueError: an argument is outside its limits.
    """
    if not 0.0 <= p <= 1.0 or not 0.0 <= gamma <= 1.0 or not 0.0 <= lam <= 100.0:
        raise ValueError("gamma and p must be from 0 to 1 and lam from 0 to 100")
    _check_n(n)
    return math.exp(min(0.0, n * (math.log(1.0 - p + p * math.exp(lam)) - gamma * lam)))


def threshold(n: int, bits: float) -> int:
    """Return the smallest k with binomial_evidence_bits(k, n) ≥ bits, or n + 1; 712 for (1024, 120)."""
    _check_n(n)
    if bits <= 0.0:
        return 0
    total, term = 0, 1
    for k in range(n, -1, -1):
        total += term
        if _bits_from_count(total, n) < bits:
            return k + 1
        term = term * k // (n - k + 1)
    return 0


def control_band(n: int, alpha: float) -> tuple[int, int]:
    """Return counts (low, high) between which a wrong key is except with chance alpha, half on each side."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be over 0 and under 1, got {alpha}")
    high = threshold(n, math.log2(2.0 / alpha)) - 1
    return n - high, high


def score_weights(scores: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Compute weights 0…15 from float32 scores, int64 [n]: min(15, ⌊8·(|s|/mean|s|)⌋).

    The computation is in float64 and rounds the sum once. Weights do not depend on labels, so under the null
    hypothesis each match is still a fair coin. A score that is not a number gets weight 0.
    """
    size = np.abs(np.asarray(scores, dtype=np.float32).astype(np.float64))
    size = np.where(np.isfinite(size), size, 0.0)
    mean = math.fsum(size.tolist()) / max(1, size.size)
    if not 0.0 < mean < math.inf:
        return np.zeros(size.shape, np.int64)
    return np.minimum(MAX_WEIGHT, np.floor(8.0 * (size / mean))).astype(np.int64)


def weighted_tail_bits(weights: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Return -log2 P(T ≥ t) for T = Σ wᵢBᵢ with fair coins Bᵢ and the observed t = Σ wᵢ·correctᵢ.

    The tail is counted exactly, in integers; n = 1,024 takes about 0.1 s.

    Args:
        weights: int [n] from 0 to 15.
        correct: bool [n].

    Raises:
        ValueError: shapes or types differ from these, or a weight is outside its limits.
    """
    w, hit = np.asarray(weights), np.asarray(correct)
    if w.ndim != 1 or w.shape != hit.shape or w.dtype.kind not in "iu" or hit.dtype.kind != "b":
        raise ValueError("weights must be int [n] and correct bool [n]")
    n = w.size
    _check_n(n)
    if w.min() < 0 or w.max() > MAX_WEIGHT:
        raise ValueError(f"weights must be from 0 to {MAX_WEIGHT}; use score_weights")
    total = int(w.sum())
    missed = total - int(w[hit].sum())
    # T ≥ t exactly when the missed weight is at most `missed`; the missed weight has the same law as T.
    if 2 * missed <= total:
        return _bits_from_count(_patterns_up_to(w.tolist(), missed), n)
    return _bits_from_count((1 << n) - _patterns_up_to(w.tolist(), total - missed - 1), n)


def _patterns_up_to(weights: list[int], limit: int) -> int:
    """Count those of the 2^n subsets that weigh at most `limit`.

    The counts a_j are the coefficients of P = Π(1 + x^w). With Q = Π(1 + x^w) over the *distinct* weights,
    P'·Q = P·R where R = Σ w·x^(w-1)·Q/(1 + x^w) over all weights: a recurrence as short as Q.
    """
    if limit < 0:
        return 0
    many = Counter(w for w in weights if w)
    q = _product(many)
    r = np.zeros(len(q), np.int64)
    for w, count in many.items():
        others = _product([v for v in many if v != w])
        r[w - 1 : w - 1 + len(others)] += count * w * others
    order = len(q) - 1
    steady = [int(r[k - 1] + k * q[k]) for k in range(1, order + 1)]
    falling = q[1:].tolist()
    recent: deque[int] = deque([1], maxlen=max(1, order))  # a_(j-1), a_(j-2), …
    patterns = 1
    for j in range(1, min(limit, sum(weights)) + 1):
        factors = (u - v * j for u, v in zip(steady, falling, strict=True))
        value = sum(map(operator.mul, factors, recent)) // j
        recent.appendleft(value)
        patterns += value
    return patterns << weights.count(0)


def _product(weights: Iterable[int]) -> npt.NDArray[np.int64]:
    """Return the coefficients of Π(1 + x^w), lowest first."""
    out = np.ones(1, np.int64)
    for w in weights:
        out = np.append(out, np.zeros(w, np.int64)) + np.append(np.zeros(w, np.int64), out)
    return out
