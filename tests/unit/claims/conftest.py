"""Fixtures of the claim tests."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from mtlsign.claims.commands import offline, owner
from mtlsign.claims.judging.judge import DetectorClaimVerifier
from tests.unit.claims.scenario import ClaimScenario


@pytest.fixture(autouse=True)
def _verifier_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify claims in this process: starting a child takes seconds. `test_isolated.py` starts children."""
    for module in (offline, owner):
        monkeypatch.setattr(module, "claim_verifier", lambda _: nullcontext(DetectorClaimVerifier()))


@pytest.fixture
def scenario(tmp_path: Path) -> ClaimScenario:
    """Scenario with a council of five members."""
    return ClaimScenario(tmp_path)


@pytest.fixture
def small_scenario(tmp_path: Path) -> ClaimScenario:
    """Scenario with a council of three members."""
    return ClaimScenario(tmp_path, ["1", "2", "3"])
