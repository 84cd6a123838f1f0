"""Rounds of council members and the tally of their votes."""

from __future__ import annotations

from mtlsign.claims import owner
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model


def test_run_member_round_once_by_five_members_confirms_claim(scenario: ClaimScenario) -> None:
    """Each of five members runs `jobs/council.py --once` one time, without further rounds."""
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], model + b" tuned", own_model=model)
    for member in scenario.members:
        scenario.run_member(member)
    tally = scenario.tally(name)
    assert tally.outcome == "accepted" and tally.counts == {"accepted": 3}
    problems = [vote.problem for vote in tally.votes if not vote.counts]
    assert problems == ["The vote is not under a confirmed checkpoint yet."] * 2
    assert scenario.standing(name).standing == "in_the_weights"
