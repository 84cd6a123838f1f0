"""Tests of the warnings about an embedding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding.advice import (
    chance_warning,
    key_size_warning,
    rejection,
    unmarked_warning,
)
from mtlsign.watermark.verification.verdict import Verdict

SETTINGS = EmbedSettings.of({"task": "digits"}).with_defaults()
REJECTED = Verdict(
    status="rejected", accepted=False, matches=560, n=1024, accuracy=0.55, p_value=0.0, evidence_bits=9.0,
    bits_required=120.0, gamma=0.7, passes_gamma=False, chernoff_bound=1.0, near_zero=0, statistic="count",
)  # fmt: skip
ACCEPTED = replace(REJECTED, status="accepted", accepted=True, matches=1024, evidence_bits=1024.0)


@pytest.mark.parametrize(
    ("bits", "required", "text"),
    [
        (128, 120, "only if 127 of them match. Raise --key-size."),
        (128, 200, "in no case. Raise --key-size."),
        (256, 120, None),
        (1024, 120, None),
    ],
)
def test_key_size_warning_names_required_matches(bits: int, required: float, text: str | None) -> None:
    warning = key_size_warning(bits, required)
    assert warning is None if text is None else warning is not None and warning.endswith(text)


@pytest.mark.parametrize(
    ("accuracy", "classes", "samples", "warned"),
    [
        (0.1, 10, 400, True),
        (0.12, 10, 400, True),
        (0.2, 10, 400, False),
        (0.5, 2, 1000, True),
        (0.7, 2, 1000, False),
        (0.1, None, 400, False),
        (-0.3, 10, 400, False),
        (0.4, 4, 9, True),
    ],
)
def test_chance_warning_for_classifier_at_chance_only(
    accuracy: float, classes: int | None, samples: int, warned: bool
) -> None:
    assert (chance_warning(accuracy, classes, samples) is not None) == warned


@pytest.mark.parametrize(
    ("share", "bits", "warned"),
    [(1.0, 600, True), (0.7, 600, True), (0.58, 600, False), (0.55, 1024, False), (0.0, 128, False),
     (None, 1024, False)],
)  # fmt: skip
def test_unmarked_warning_only_beyond_chance(share: float | None, bits: int, warned: bool) -> None:
    assert (unmarked_warning(share, bits) is not None) == warned


def test_unmarked_warning_counts_bits_and_names_a_remedy() -> None:
    warning = unmarked_warning(1.0, 600)
    assert warning is not None and warning.startswith("The unmarked model shows 600 of 600 bits, too")
    assert warning.endswith("Choose --preset spread or keyed.")


def test_rejection_states_evidence_and_remedies() -> None:
    problem = rejection([ACCEPTED, REJECTED], SETTINGS, 0.55)
    assert (
        problem is not None
        and "560 of 1,024 bits match, which is 9.0 bits of evidence instead of 120" in problem
    )
    assert "raise --phase2.steps (500) or --phase2.lr" in problem and "lower --lambda1 (3)" in problem
    assert "--key-size" not in problem and "Do not publish the model." in problem
    small = replace(REJECTED, n=128, matches=120, evidence_bits=80.0)
    assert "raise --key-size" in str(rejection([small], SETTINGS, 1.0))
    assert "raise --phase2.steps" not in str(rejection([small], SETTINGS, 1.0))
    unreadable = replace(REJECTED, status="not_verifiable", reason="conv1 is missing")
    assert "cannot be read: conv1 is missing" in str(rejection([unreadable], SETTINGS, None))
    assert rejection([ACCEPTED, replace(REJECTED, status="needs_commitment")], SETTINGS, 0.5) is None
