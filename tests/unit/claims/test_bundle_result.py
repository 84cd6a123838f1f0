"""Result of a checked bundle, and its report page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtlsign.claims import owner
from mtlsign.claims.bundle import check_bundle, write_bundle
from mtlsign.claims.bundle_result import to_json
from mtlsign.claims.commands.settings import signed_note
from mtlsign.reports.claims import render_claim_report
from tests.unit.claims.scenario import ALICE, ClaimScenario, SubstringJudge, kit_and_model

HOSTILE = "<script>alert(1)</script> **supported**"


@pytest.mark.parametrize("is_pinned", [True, False])
def test_report_names_claimant_model_policy_signers_and_times(
    small_scenario: ClaimScenario, is_pinned: bool
) -> None:
    scenario = small_scenario
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit], licence="MIT")
    scenario.cosign_all()
    entry, claim = owner.claim(
        scenario.owner(ALICE), [kit], scenario.archive, model + b" tuned", own_model=model,
        suspect_name=HOSTILE,
    )  # fmt: skip
    view = scenario.run_council()
    path: Path = scenario.folder / "claim.zip"
    write_bundle(path, scenario.ledger, view, entry, scenario.archive)
    note = signed_note(scenario.ledger, view) if is_pinned else None
    page = render_claim_report(to_json(check_bundle(path, SubstringJudge(), pinned=note)))
    assert ALICE.public_key.hex() in page and claim.suspect.hex() in page and "MIT" in page
    assert "120 bits" in page and "2 of 3 members" in page and "3 of 3" in page
    assert all(member.public_key.hex() in page for member in scenario.members)
    assert len(re.findall(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", page)) >= 9 and "17900000" not in page
    assert "<script>" not in page and "secret part of the run" not in page
    assert ("only confirms itself" in page) is not is_pinned
    assert ("<h1>supported</h1>" in page) is is_pinned
