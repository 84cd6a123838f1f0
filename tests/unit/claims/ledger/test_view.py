"""Views of a ledger: valid statements, councils and confirmed checkpoints."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from mtlsign.claims import owner
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger import view as view_module
from mtlsign.claims.ledger.view import IncrementalReader, LedgerView, read_ledger
from mtlsign.claims.statements.envelope import open_envelope, sign
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.errors import LedgerError
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model, make_identity
from tests.unit.claims.tampering import (
    rewrite_entries,
)


@pytest.fixture
def scenario(small_scenario: ClaimScenario) -> ClaimScenario:
    """Council of three members."""
    return small_scenario


def test_view_shows_malformed_and_repeated_entries_without_effect(scenario: ClaimScenario) -> None:
    index = scenario.ledger.append(b"\x00 not even JSON")
    scenario.append_registration("a")
    view = scenario.cosign_all()
    assert view.entries[index].statement is None and view.entries[index].problem
    assert view.time(index) is not None and view.time(index + 1) is not None
    repeated = LedgerView.from_entries([*scenario.ledger.scan(), scenario.ledger.get(2)], [])
    assert repeated.entries[3].problem == "The entry repeats entry 2."


@pytest.mark.parametrize(
    ("size", "root"),
    [(-1, None), (-(2**62), None), (2**62, None), (1, b""), (1, b"short"), ("many", None), (2.5, "text")],
)
def test_view_skips_stored_cosignatures_of_impossible_trees(
    scenario: ClaimScenario, size: object, root: object
) -> None:
    expected = scenario.cosign_all().confirmed
    with sqlite3.connect(scenario.ledger_path) as database:
        stored, line = database.execute("SELECT root, line FROM cosignatures").fetchone()
        row = (size, stored if root is None else root, line)
        database.execute("INSERT INTO cosignatures VALUES (?, ?, ?)", row)
    database.close()
    assert scenario.view().confirmed == expected and read_ledger(scenario.ledger).confirmed == expected


def test_view_council_changes_only_with_threshold_of_current_members(scenario: ClaimScenario) -> None:
    origin, new = scenario.view().origin, [make_identity("4"), make_identity("5")]
    changed = Membership(
        signer=scenario.members[0].public_key, ledger=origin, time=0, previous=Ref(0, origin), threshold=2,
        members=tuple(sorted(m.public_key for m in new)),
    )  # fmt: skip
    founder = replace(changed, signer=make_identity("founder").public_key)
    alone = scenario.ledger.append(sign_statement(changed, scenario.members[0]))
    by_founder = scenario.ledger.append(sign_statement(founder, make_identity("founder")))
    by_new_members = scenario.ledger.append(sign_statement(changed, scenario.members[0], *new))
    assert len(scenario.view().councils) == 1
    assert all(
        "fewer than 2" in str(scenario.view().entries[i].problem) for i in (alone, by_founder, by_new_members)
    )
    good = scenario.ledger.append(sign_statement(changed, *scenario.members[:2]))
    assert [i for i, _ in scenario.view().councils] == [0, good]
    scenario.cosign_all()  # the former members no longer count
    assert scenario.view().time(good) is None
    first, scenario.members = scenario.members[0], new
    assert scenario.cosign_all().time(good) is not None
    late = scenario.ledger.append(
        sign_statement(replace(changed, time=1), first, *new)
    )  # follows entry 0 and not the council in force
    assert scenario.view().entries[late].problem == "The membership does not follow the membership in force."


def test_view_confirms_checkpoint_only_with_threshold(scenario: ClaimScenario) -> None:
    index = scenario.append_registration("a")
    scenario.witness(0).run_once()
    assert scenario.view().time(index) is None
    for non_member in ("x", "y", "z"):
        scenario.witness(make_identity(non_member)).run_once()
    assert scenario.view().time(index) is None
    scenario.witness(1).run_once()
    first = scenario.view().time(index)
    scenario.witness(2).run_once()
    assert (
        first is not None
        and scenario.view().time(index) == sorted(scenario.view().confirmed[0].times.values())[1]
    )


def test_incremental_reader_detects_rewritten_entries(scenario: ClaimScenario) -> None:
    scenario.append_registration("a")
    reader = IncrementalReader(scenario.ledger)
    reader.view()
    rows = list(scenario.ledger.scan())
    rewrite_entries(scenario, [rows[0], b"forged", b"longer"])
    with pytest.raises(LedgerError, match="not the tree of the entries"):
        reader.view()


def test_view_ignores_statements_of_another_ledger(scenario: ClaimScenario) -> None:
    kit, _ = kit_and_model(ALICE)
    other = ClaimScenario(scenario.folder / "other", ["1"])
    entry, _ = owner.publish(other.owner(ALICE), [kit])
    index = scenario.ledger.append(other.ledger.get(entry.index))
    second = scenario.ledger.append(other.ledger.get(0))  # membership that creates the other ledger
    view = scenario.view()
    assert (
        view.entries[index].problem == "The statement was made for another ledger."
        and view.entries[index].statement is None
    )
    assert (
        view.entries[second].problem == "The statement was made for another ledger."
        or view.entries[second].statement is None
    )
    assert len(view.councils) == 1


def test_incremental_reader_parses_and_verifies_only_new_entries(
    scenario: ClaimScenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost does not depend on the length of the ledger, nor on entries or lines without effect."""
    for i in range(5):
        scenario.append_registration(f"m{i}")
    scenario.ledger.append(b"junk")
    scenario.cosign_all()
    reader = IncrementalReader(scenario.ledger)
    before = reader.view()
    opened, checked = [], []
    original, is_valid = view_module.open_statement, checkpoints.is_valid_signature
    monkeypatch.setattr(view_module, "open_statement", lambda data: opened.append(data) or original(data))
    monkeypatch.setattr(
        checkpoints, "is_valid_signature", lambda *args: checked.append(args) or is_valid(*args)
    )
    assert reader.view() == before and not opened and not checked
    added = scenario.append_registration("new")
    opened.clear(), checked.clear()
    later = IncrementalReader(scenario.ledger, reader).view()
    assert opened == [scenario.ledger.get(added)] and not checked
    assert later.entries[added].statement is not None and len(before.entries) == added
    assert later.confirmed == before.confirmed


def test_incremental_reader_of_shorter_ledger_names_cause_and_remedy(scenario: ClaimScenario) -> None:
    scenario.append_registration("a")
    reader = IncrementalReader(scenario.ledger)
    reader.view()
    rewrite_entries(scenario, list(scenario.ledger.scan())[:1])
    with pytest.raises(LedgerError, match=r"has 1 entries, but had 2 before.*restore a complete copy"):
        reader.view()


def test_view_shows_key_that_any_copy_of_a_claim_makes_public(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    other = ClaimScenario(scenario.folder / "other", ["1"])
    owner.publish(other.owner(ALICE), [kit])
    entry, claim = owner.claim(other.owner(ALICE), [kit], other.archive, model)
    copy = other.ledger.get(entry.index)
    by_copier = sign(open_envelope(copy).payload, make_identity("copier"))
    for data in (copy, by_copier, copy.replace(b'"sig":"', b'"sig":"AA')):
        index = scenario.ledger.append(data)
        listed = scenario.view().entries[index]
        assert listed.statement is None and listed.opening == claim.opening
