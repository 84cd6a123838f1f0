"""Tests of the report of a sweep."""

from __future__ import annotations

import pytest

from mtlsign.reports import sweeps


@pytest.mark.parametrize(("bits", "weak"), [(50.0, True), (120.0, False)])
def test_headline_of_weak_recommendation_states_required_bits(bits: float, weak: bool) -> None:
    best = {"lambda1": 0.02, "lambda2": 0.1, "evidence_bits_attacked": bits, "drop_points": 0.2}
    text = sweeps._headline(
        {"recommended": best, "vary": ["lambda1", "lambda2"], "bits_required": 120.0, "cells": 1}
    )
    assert ("(120 bits are required)" in text) == weak and "loses 0.20 points" in text
