"""Tests of the comparison of random keys with the binomial distribution."""

from __future__ import annotations

import random

import pytest

from mtlsign.experiments.paper_studies.random_keys import compare_with_binomial


def test_compare_with_binomial_separates_fair_from_biased_bits() -> None:
    generator = random.Random(1)

    def accuracies(p: float) -> list[float]:
        return [sum(generator.random() < p for _ in range(600)) / 600 for _ in range(400)]

    fair = compare_with_binomial(accuracies(0.5), 600)
    biased = compare_with_binomial(accuracies(0.51), 600)
    assert fair["p"] > 0.001 > biased["p"] and fair["keys"] == 400
    assert fair["sd of Binomial(N, 1/2)"] == pytest.approx(0.0204, abs=1e-4)
