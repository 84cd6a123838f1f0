"""Witnesses: detection of truncated, rewritten, forked and replaced ledgers."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from mtlsign.claims import owner
from mtlsign.claims.ledger import checkpoints, witness_state
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.ledger.view import read_ledger
from mtlsign.claims.ledger.witness import Witness
from mtlsign.errors import KeyMaterialError, LedgerError, MTLSignError
from tests.unit.claims.scenario import ClaimScenario, make_identity
from tests.unit.claims.tampering import (
    delete_ledger_file,
    dump_sql,
    execute_without_triggers,
    rewrite_entries,
)


@pytest.fixture
def scenario(small_scenario: ClaimScenario) -> ClaimScenario:
    """Council of three members."""
    return small_scenario


@pytest.mark.parametrize(
    "manipulation", ["truncate", "rewrite", "reorder", "fork", "node", "row", "replace", "roll back"]
)
def test_witness_detects_altered_ledger(scenario: ClaimScenario, manipulation: str) -> None:
    for i in range(6):
        scenario.append_registration(f"m{i}")
    saved = scenario.folder / "saved.db"
    dump_sql(scenario, str(saved))
    scenario.cosign_all()
    for i in range(3):
        scenario.append_registration(f"n{i}")
    scenario.cosign_all()
    rows = list(scenario.ledger.scan())
    if manipulation == "truncate":
        rewrite_entries(scenario, rows[:8])
    elif manipulation == "rewrite":
        rewrite_entries(scenario, [*rows[:3], b"forged", *rows[4:], b"and", b"longer"])
    elif manipulation == "reorder":
        rewrite_entries(scenario, [*rows[:5], rows[6], rows[5], *rows[7:]])
    elif manipulation == "fork":
        rewrite_entries(scenario, [*rows[:8], b"another", b"future", b"longer"])
    elif manipulation == "node":
        execute_without_triggers(scenario, "UPDATE nodes SET hash = zeroblob(32) WHERE level = 1 AND idx = 1")
    elif manipulation == "row":
        execute_without_triggers(scenario, "UPDATE entries SET envelope = x'00' WHERE idx = 4")
    elif manipulation == "replace":
        rewrite_entries(scenario, [ClaimScenario(scenario.folder / "other", ["1"]).ledger.get(0), *rows[1:]])
    else:
        delete_ledger_file(scenario)
        shutil.copy(saved, scenario.ledger_path)
    reopened = open_ledger(scenario.ledger.uri)
    with pytest.raises(LedgerError):
        scenario.witness(0, reopened).run_once()
    if manipulation not in (
        "replace",
        "roll back",
    ):  # a new reader cannot recognize an older or another ledger
        with pytest.raises(LedgerError):
            read_ledger(reopened)


def test_witness_with_default_state_pins_origin_to_store(scenario: ClaimScenario) -> None:
    """The default state file is named by the ledger's origin, so only the pin detects another ledger."""
    member, path = scenario.members[0], scenario.ledger_path
    assert Witness(member, scenario.ledger).run_once().cosigned
    assert Witness(member, scenario.ledger).run_once().cosigned == ()
    other = ClaimScenario(scenario.folder / "other", ["1", "2", "3"], bits=99)
    dump_sql(other, str(scenario.folder / "new.db"))
    delete_ledger_file(scenario)
    shutil.copy(scenario.folder / "new.db", path)
    with open_ledger(scenario.ledger.uri) as replaced:
        with pytest.raises(LedgerError, match=r"another ledger .* nothing was signed"):
            Witness(member, replaced).run_once()
        names = [line.name for _, line in replaced.cosignatures(replaced.origin())]
        assert checkpoints.MEMBER + member.public_key.hex() not in names
        assert Witness(make_identity("newcomer"), replaced).run_once().cosigned  # has no pin; --origin helps
    path.unlink()
    with open_ledger(scenario.ledger.uri, create=True) as empty:
        with pytest.raises(LedgerError, match="store held the ledger"):
            Witness(member, empty)
        with pytest.raises(LedgerError, match="store held the ledger"):
            owner.create_ledger(owner.Owner(member, empty), [member.public_key])
        assert empty.size() == 0
    pin = witness_state.pin_path(member, f"sqlite:///{path}")
    good = pin.read_bytes()
    for byte in range(len(good)):
        pin.write_bytes(good[:byte] + bytes([good[byte] ^ 1]) + good[byte + 1 :])
        with pytest.raises(MTLSignError):
            witness_state.pinned_origin(member, f"sqlite:///{path}")


def test_witness_restores_deleted_cosignatures(scenario: ClaimScenario) -> None:
    """Without the checkpoints between two entries, the order of their times would be lost."""
    for name in ("a", "b"):
        scenario.append_registration(name)
        scenario.cosign_all()
    before = scenario.view()
    execute_without_triggers(scenario, "DELETE FROM cosignatures")
    assert scenario.view().time(1) is None
    assert all(
        "were missing and are restored" in scenario.witness(i).run_once().warnings[0] for i in range(3)
    )
    after = scenario.view()
    assert [after.time(i) for i in range(3)] == [before.time(i) for i in range(3)]
    assert [c.checkpoint for c in after.confirmed] == [c.checkpoint for c in before.confirmed]
    lines = scenario.witness_state_path(scenario.members[0]).with_name(
        scenario.witness_state_path(scenario.members[0]).name + ".lines"
    )
    lines.write_bytes(
        lines.read_bytes()[:-20] + b"\xff\n77\nx y\n"
    )  # a torn line and garbage cost only that line
    execute_without_triggers(scenario, "DELETE FROM cosignatures")
    assert scenario.witness(0).run_once().warnings


def test_witness_warns_of_replayed_entry_without_effect(scenario: ClaimScenario) -> None:
    """The backend gives equal bytes equal numbers, but the owner of the file can append them twice."""
    index = scenario.append_registration("a")
    assert scenario.ledger.append(scenario.ledger.get(index)) == index
    scenario.cosign_all()
    rows = list(scenario.ledger.scan())
    execute_without_triggers(
        scenario,
        "DROP TABLE entries",
        "CREATE TABLE entries(idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL, envelope BLOB NOT NULL)",
    )
    rewrite_entries(scenario, [*rows, rows[index]])
    with open_ledger(scenario.ledger.uri) as reopened:
        assert (
            f"Entry {len(rows)} repeats an earlier one." in scenario.witness(0, reopened).run_once().warnings
        )
        assert read_ledger(reopened).entries[len(rows)].problem == f"The entry repeats entry {index}."


def test_witness_names_member_that_cosigned_another_tree(scenario: ClaimScenario) -> None:
    scenario.append_registration("a")
    forger = scenario.members[2]
    other_tree = Checkpoint(scenario.view().origin, 2, bytes(32))
    scenario.ledger.store_cosignature(other_tree, checkpoints.cosign(forger, other_tree, 5))
    step = scenario.witness(0).run_once()
    assert step.cosigned and any("FORK" in r and forger.public_key.hex()[:16] in r for r in step.warnings)
    scenario.witness(1).run_once()
    view = scenario.view()
    assert view.time(1) is not None and any(
        forger.public_key.hex()[:16] in warning for warning in view.warnings
    )
    second = scenario.members[1]
    scenario.ledger.store_cosignature(other_tree, checkpoints.cosign(second, other_tree, 6))
    with pytest.raises(LedgerError, match="co-signed another tree"):
        scenario.view()


def test_witness_cosigns_despite_forged_line_in_its_name(scenario: ClaimScenario) -> None:
    """A party with the store's credentials writes invalid lines in a member's name before that member."""
    index = scenario.append_registration("a")
    checkpoint, member = scenario.ledger.checkpoint(), scenario.members[0]
    for forged in (
        b"\0" * 64,
        checkpoints.cosign(member, Checkpoint(checkpoint.origin, 99, checkpoint.root), 5).signature,
    ):
        name = checkpoints.MEMBER + member.public_key.hex()
        scenario.ledger.store_cosignature(
            checkpoint, Cosignature(name, checkpoints.key_id(name, member.public_key), 5, forged)
        )
    assert scenario.witness(0).run_once().cosigned == (2,) and scenario.witness(0).run_once().cosigned == ()
    assert scenario.cosign_all().time(index) is not None


def test_witness_warns_of_wrong_clocks_and_times_never_decrease(scenario: ClaimScenario) -> None:
    scenario.cosign_all()
    back = scenario.append_registration("back-dated", time=1_000_000_000)
    ahead = scenario.append_registration("ahead", time=2_000_000_000)
    step = scenario.witness(0).run_once()
    assert any(f"Entry {back} is back-dated" in warning for warning in step.warnings)
    assert any(f"Entry {ahead} is dated" in warning for warning in step.warnings)
    scenario.witness(1).run_once()
    # The co-signers' clocks decide, not the sender's.
    assert (scenario.view().time(back) or 0) > 1_789_000_000
    scenario.clock.now = 1_600_000_000
    scenario.append_registration("after the own clock went back")
    step = scenario.witness(0).run_once()
    assert any("Own clock went back" in warning for warning in step.warnings)
    scenario.clock.now = 1_500_000_000
    view = scenario.cosign_all()
    times = [view.time(index) for index in view.entries]
    assert times == sorted(times)  # type: ignore[type-var]


def test_witness_after_crash_before_publication_cosigns_the_same_tree(
    scenario: ClaimScenario, monkeypatch: Any
) -> None:
    scenario.append_registration("a")
    witness = scenario.witness(0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenario.ledger, "store_cosignature", crash)
    with pytest.raises(KeyboardInterrupt):
        witness.run_once()
    monkeypatch.undo()
    assert scenario.witness(0).run_once().cosigned == (2,) and scenario.witness(0).run_once().cosigned == ()


def test_witness_with_state_of_another_member_is_refused(scenario: ClaimScenario) -> None:
    scenario.cosign_all()
    with pytest.raises(KeyMaterialError, match="belongs to another witness"):
        Witness(
            scenario.members[0], scenario.ledger, scenario.witness_state_path(scenario.members[1])
        ).run_once()


def test_witness_cosigns_no_size_that_only_foreign_or_invalid_lines_name(scenario: ClaimScenario) -> None:
    for i in range(6):
        scenario.append_registration(f"m{i}")
    foreign, member = make_identity("foreign"), scenario.members[1]
    for size in range(1, 6):
        checkpoint = scenario.ledger.checkpoint(size)
        scenario.ledger.store_cosignature(checkpoint, checkpoints.cosign(foreign, checkpoint, 5))
        line = checkpoints.cosign(member, checkpoint, 5)
        scenario.ledger.store_cosignature(checkpoint, Cosignature(line.name, line.key_id, 6, line.signature))
    other_tree = Checkpoint(scenario.view().origin, 3, bytes(32))
    scenario.ledger.store_cosignature(other_tree, checkpoints.cosign(foreign, other_tree, 5))
    step = scenario.witness(0).run_once()
    assert step.cosigned == (7,) and not step.warnings
    checkpoint = scenario.ledger.checkpoint(7)
    scenario.append_registration("last")
    scenario.ledger.store_cosignature(checkpoint, checkpoints.cosign(member, checkpoint, 9))
    assert scenario.witness(2).run_once().cosigned == (7, 8)  # a member's line is followed
