"""Rounds of council members and the tally of their votes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mtlsign.claims import owner
from mtlsign.claims.bundle import check_bundle, write_bundle
from mtlsign.claims.commands.settings import signed_note
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import run_member_round
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.statements import envelope
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.errors import StorageError
from tests.unit.claims.scenario import ALICE, BOB, ClaimScenario, SubstringJudge, kit_and_model


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
    assert scenario.standing(name).standing == "supported"


def test_run_member_round_with_unreachable_archive_postpones_only_that_claim(
    scenario: ClaimScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    other_kit, other_model = kit_and_model(BOB)
    owner.publish(scenario.owner(BOB), [other_kit])
    first = scenario.claim(ALICE, [kit], model + b" tuned", own_model=model)
    second = scenario.claim(BOB, [other_kit], other_model + b" tuned", own_model=other_model)
    lost = hashlib.sha256(model + b" tuned").digest()
    original = scenario.archive.get

    def get(digest: bytes, limit: int) -> bytes:
        if digest == lost:
            raise StorageError("The server does not answer. Start it.", field="archive")
        return original(digest, limit)

    monkeypatch.setattr(scenario.archive, "get", get)
    member = scenario.members[0]
    options = {"witness_state": scenario.witness_state_path(member), "clock": scenario.clock}
    result = run_member_round(member, scenario.ledger, scenario.archive, SubstringJudge(), **options)
    indices = [find_claim(scenario.view(), name)[0].index for name in (first, second)]
    assert [index for index, _, _ in result.votes] == [indices[1]]
    assert [index for index, _ in result.postponed] == [indices[0]]
    monkeypatch.undo()
    result = run_member_round(member, scenario.ledger, scenario.archive, SubstringJudge(), **options)
    assert [index for index, _, _ in result.votes] == [indices[0]]


def test_council_of_64_members_with_threshold_64_acts_and_changes(tmp_path: Path) -> None:
    scenario = ClaimScenario(tmp_path, [f"m{i}" for i in range(64)], threshold=64)
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], model + b" tuned", own_model=model)
    view = scenario.cosign_all()
    note = signed_note(scenario.ledger, view)
    assert len(checkpoints.parse_signed_note(note)[1]) == 64
    entry, _ = find_claim(view, name)
    write_bundle(tmp_path / "claim.zip", scenario.ledger, view, entry, scenario.archive)
    checked = check_bundle(tmp_path / "claim.zip", SubstringJudge(), pinned=note)
    assert checked.dispute.standings[0].standing == "supported"
    assert scenario.tally(name).threshold == 64
    change = Membership(
        signer=scenario.members[0].public_key, ledger=view.origin, time=0, threshold=63,
        members=tuple(sorted(member.public_key for member in scenario.members)),
        previous=Ref(0, view.origin),
    )  # fmt: skip
    envelopes = [envelope.sign(change.payload(), member) for member in scenario.members]
    index = scenario.ledger.append(envelope.merge(*envelopes))
    assert [start for start, _ in scenario.view().councils] == [0, index]
