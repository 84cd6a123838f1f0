"""Scores of a suspect, and the bits that are read from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A score nearer to 0 than this counts as wrong and is reported (docs/decisions/0001).
MIN_SCORE = 1e-4


@dataclass(frozen=True)
class ScoreResult:
    """Scores of a suspect's tensors, found in one place of its file.

    Attributes:
        scores: [N] on the CPU; None if the tensors cannot be read.
        problem: why they cannot be read; None if they were.
        missing: kernels that are missing or damaged; they contribute nothing to the scores.
        similarity: how alike the aligned kernels and those of W0 are, from 0 to 1.
        recognized: whether the kernels are recognised as those of a descendant of W0.
        by_content: whether the kernels were found without their names.
    """

    scores: Tensor | None
    problem: str | None = None
    missing: tuple[str, ...] = ()
    similarity: float = 0.0
    recognized: bool = False
    by_content: bool = False


def checked_scores(scores: Tensor) -> ScoreResult:
    """Return scores, or the problem that they are not finite."""
    if not torch.isfinite(scores).all():
        return ScoreResult(None, "its values overflow in float32")
    return ScoreResult(scores)


def best_result(results: Sequence[ScoreResult], bits: Tensor) -> ScoreResult:
    """Return the result with most matching bits; if no tensors can be read, the first result."""

    def count(result: ScoreResult) -> int:
        return -1 if result.scores is None else int(matching_bits(result.scores, bits).sum())

    return max(results, key=count)


def matching_bits(scores: Tensor, bits: Tensor) -> Tensor:
    """Compare N scores with N bits: bool [N]. A score within 1e-4 of 0 never matches."""
    return ((scores > 0) == (bits.to(scores.device) > 0)) & (scores.abs() >= MIN_SCORE)
