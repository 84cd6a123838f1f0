"""Confirmed checkpoints after a change of the council."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mtlsign.claims.ledger import checkpoints, confirmation
from mtlsign.claims.ledger.checkpoints import Checkpoint
from mtlsign.claims.ledger.confirmation import LineCache
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.errors import LedgerError
from mtlsign.watermark.keys.identity import Identity
from tests.conformance import reference_claim_verifier
from tests.unit.claims.scenario import ClaimScenario, make_identity

LATER = 4_000_000_000


@dataclass
class ChangedCouncil:
    """Ledger whose council of three was replaced at entry 3. Entry 1 is an early registration."""

    scenario: ClaimScenario
    former: list[Identity]
    start: int

    def cosign_as_former(self, size: int, time: int, members: int = 2, root: bytes | None = None) -> None:
        """Store co-signatures of former members, whose keys were rotated out."""
        checkpoint = self.scenario.ledger.checkpoint(size)
        if root is not None:
            checkpoint = Checkpoint(checkpoint.origin, size, root)
        for member in self.former[:members]:
            line = checkpoints.cosign(member, checkpoint, time)
            self.scenario.ledger.store_cosignature(checkpoint, line)


@pytest.fixture
def changed(small_scenario: ClaimScenario) -> ChangedCouncil:
    scenario = small_scenario
    scenario.cosign_all()
    scenario.append_registration("early")
    scenario.append_registration("second")
    scenario.cosign_all()
    former, origin = scenario.members, scenario.view().origin
    scenario.members = [make_identity(name) for name in ("4", "5", "6")]
    membership = Membership(
        signer=former[0].public_key, ledger=origin, time=0, previous=Ref(0, origin), threshold=2,
        members=tuple(sorted(member.public_key for member in scenario.members)),
    )  # fmt: skip
    start = scenario.append(membership, *former[:2])
    scenario.append_registration("late")
    scenario.cosign_all()
    return ChangedCouncil(scenario, former, start)


def test_view_with_late_lines_of_former_members_keeps_all_times(changed: ChangedCouncil) -> None:
    before = changed.scenario.view()
    changed.cosign_as_former(2, LATER)
    view = changed.scenario.view()
    assert [view.time(i) for i in view.entries] == [before.time(i) for i in before.entries]
    assert "checkpoints of 2 entries" in view.warnings[0] and "do not count" in view.warnings[0]
    signed = [
        {"size": checkpoint.size, "line": line.to_line()}
        for checkpoint, line in changed.scenario.ledger.cosignatures(view.origin)
    ]
    second_reader = reference_claim_verifier.read(list(changed.scenario.ledger.scan()), signed)
    assert second_reader["times"] == [view.time(i) for i in view.entries]


def test_view_with_late_line_of_one_former_member_keeps_checkpoint(changed: ChangedCouncil) -> None:
    before = changed.scenario.view()
    changed.cosign_as_former(3, LATER, members=1)
    assert changed.scenario.view().confirmed == before.confirmed


def test_view_with_fork_of_former_members_warns_only(changed: ChangedCouncil) -> None:
    """The council in force confirmed a longer tree, so keys that were rotated out cannot stop a reader."""
    before = changed.scenario.view()
    changed.cosign_as_former(2, 5, root=bytes(32))
    view = changed.scenario.view()
    assert view.confirmed == before.confirmed and "another tree of 2 entries" in view.warnings[0]


def test_view_with_fork_of_council_in_force_is_refused(changed: ChangedCouncil) -> None:
    changed.former = changed.scenario.members
    changed.cosign_as_former(5, 5, root=bytes(32))
    with pytest.raises(LedgerError, match="another tree of 5 entries"):
        changed.scenario.view()


def test_witness_remarks_back_dated_lines_of_former_members_once(changed: ChangedCouncil) -> None:
    """A line with an early time looks like an old one, but a witness knows the former times."""
    scenario = changed.scenario
    assert not scenario.witness(0).run_once().warnings
    changed.cosign_as_former(2, 1_790_000_005)
    (warning,) = scenario.witness(0).run_once().warnings
    assert "arrived late" in warning and "2 entries" in warning
    assert not scenario.witness(0).run_once().warnings


def test_line_cache_checks_each_line_once(changed: ChangedCouncil, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = changed.scenario.ledger.checkpoint(2)
    line, cache = checkpoints.cosign(changed.former[0], checkpoint, 7), LineCache()
    assert cache.is_valid(checkpoint, line)
    monkeypatch.setattr(checkpoints, "is_valid_signature", lambda *_: pytest.fail("checked twice"))
    assert cache.is_valid(checkpoint, line)


def test_member_times_limit_counts_lines_in_the_name_of_members_only(
    changed: ChangedCouncil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that outsiders could exhaust would stop every reader."""
    scenario = changed.scenario
    outsider, checkpoint = make_identity("outsider"), scenario.ledger.checkpoint(changed.start + 1)
    lines = [(checkpoint, checkpoints.cosign(outsider, checkpoint, LATER + i)) for i in range(5)]
    member = [(checkpoint, checkpoints.cosign(scenario.members[0], checkpoint, LATER + i)) for i in range(3)]
    councils = scenario.view().councils
    monkeypatch.setattr(confirmation, "MAX_LINES", 2)
    times = confirmation.member_times(councils, [*lines, *member[:2]], LineCache())
    assert times == {checkpoint: {scenario.members[0].public_key: LATER}}
    with pytest.raises(LedgerError, match="Over 2 co-signatures name members in force"):
        confirmation.member_times(councils, member, LineCache())
