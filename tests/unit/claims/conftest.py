"""Fixtures of the claim tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.claims.scenario import ClaimScenario


@pytest.fixture
def scenario(tmp_path: Path) -> ClaimScenario:
    """Scenario with a council of five members."""
    return ClaimScenario(tmp_path)


@pytest.fixture
def small_scenario(tmp_path: Path) -> ClaimScenario:
    """Scenario with a council of three members."""
    return ClaimScenario(tmp_path, ["1", "2", "3"])
