"""Standings of single claims."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from mtlsign.claims import owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.lineage import resolve_dispute
from mtlsign.claims.judging.standings import REASONS, STANDINGS
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Membership, Ref
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import (
    ALICE,
    BOB,
    ClaimScenario,
    SubstringJudge,
    kit_and_model,
    make_identity,
)


def test_reasons_have_known_standings() -> None:
    assert {standing for standing, _ in REASONS.values()} == set(STANDINGS)


def test_standing_on_ledger_without_other_cosigners_is_self_attested(tmp_path: Path) -> None:
    scenario = ClaimScenario(tmp_path, ["alice"])
    kit, model = kit_and_model(ALICE)
    entry, _ = owner.publish(scenario.owner(ALICE), [kit])
    assert scenario.view().time(entry.index) is not None  # a council of one co-signs as it appends
    name = scenario.claim(ALICE, [kit], model, own_model=model)
    assert scenario.standing(name).standing == "self_attested"
    new = Membership(
        signer=ALICE.public_key, ledger=scenario.view().origin, time=0,
        previous=Ref(0, scenario.view().origin),
        members=tuple(sorted([BOB.public_key, ALICE.public_key])), threshold=2,
    )  # fmt: skip
    scenario.ledger.append(sign_statement(new, ALICE))
    scenario.witness(ALICE).run_once()
    scenario.witness(BOB).run_once()
    # Later co-signers do not change the first confirmed checkpoint of the publication.
    assert scenario.standing(name).standing == "self_attested"


def test_standing_with_unmarked_committed_model_is_not_supported(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    empty = b"without any key"
    hollow = replace(kit, info={"model_digest": scenario.archive.put(empty).hex()})
    owner.publish(scenario.owner(ALICE), [hollow])
    name = scenario.claim(ALICE, [hollow], model, own_model=empty)
    scenario.cosign_all()
    assert scenario.standing(name).reason == "committed_model_unmarked"


def test_standing_with_wrong_key_or_missing_evidence_is_not_supported(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    names = {}
    alice = scenario.owner(ALICE)
    for about, suspect in (("innocent", b"innocent"), ("broken", b"broken model")):
        owner.register(alice, scenario.archive, [(about, suspect)])
    for about, suspect in (("innocent", b"innocent"), ("broken", b"broken model")):
        names[about] = scenario.claim(ALICE, [kit], suspect, own_model=model)
    scenario.run_council()
    assert scenario.standing(names["innocent"]).reason == "not_in_the_weights"
    assert scenario.tally(names["innocent"]).outcome == "rejected"
    assert scenario.standing(names["broken"]).standing == "not_verifiable"
    assert scenario.tally(names["broken"]).outcome == "not_verifiable"
    (scenario.folder / "archive" / "blobs" / hashlib.sha256(b"innocent").hexdigest()).unlink()
    assert scenario.standing(names["innocent"]).standing == "not_verifiable"
    scenario.archive.storages[0].delete("blobs/" + hashlib.sha256(b"reference").hexdigest())
    assert scenario.standing(names["broken"]).reason == "evidence_missing"


def test_standing_with_altered_archive_is_not_verifiable(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], b"innocent", own_model=model)
    scenario.archive.storages[0].write("blobs/" + hashlib.sha256(b"innocent").hexdigest(), model)
    scenario.cosign_all()
    assert scenario.standing(name).standing == "not_verifiable"


def test_standing_with_trained_head_needs_commitment_and_makes_no_edge(scenario: ClaimScenario) -> None:
    """A trained head can match a rival's published model, which does not make the rival a descendant."""
    own_kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [own_kit])
    forger = make_identity("forger")
    kit, junk = kit_and_model(forger, head=b"a head")
    owner.publish(scenario.owner(forger), [kit])
    both = model + kit.opening.key().hex().encode()  # the forger's head matches any model
    forged_claim = scenario.claim(forger, [kit], both, own_model=junk)
    own_claim = scenario.claim(ALICE, [own_kit], both, own_model=model)
    scenario.run_council()
    assert scenario.tally(forged_claim).outcome == "needs_commitment"
    assert scenario.standing(forged_claim).reason == "free_head"
    result = scenario.dispute(own_claim, forged_claim)
    assert result.standings[0].standing == "supported" and result.edges[0].kind == "unrelated"


@pytest.mark.parametrize("by", [ALICE, BOB])
def test_standing_with_model_registered_before_publication_needs_commitment(
    scenario: ClaimScenario, by: Identity
) -> None:
    """The order is checked for each registration of the model, also for one that the claim does not name."""
    kit, model = kit_and_model(ALICE)
    suspect = model + b" met before the commitment"
    owner.register(scenario.owner(by), scenario.archive, [("x", suspect)])
    owner.publish(scenario.owner(ALICE), [kit])
    scenario.cosign_all()
    name = scenario.claim(ALICE, [kit], suspect, own_model=model)
    again = owner.register(scenario.owner(ALICE), scenario.archive, [("again", suspect)])
    _, claim = find_claim(scenario.view(), name)
    later = replace(claim, register=again, time=7)
    later_name = str(scenario.append(later, ALICE))
    scenario.run_council()
    for claimed in (name, later_name):
        standing = scenario.standing(claimed)
        if standing.reason != "opened_before_registered":
            assert (standing.standing, standing.reason) == (
                "needs_commitment",
                "registered_before_publication",
            )
            assert "registered (entry 1) before" in standing.sentence
    assert scenario.standing(name).reason == "registered_before_publication"


def test_standing_of_trained_head_with_earlier_registration_names_the_order(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE, head=b"a head")
    owner.register(scenario.owner(BOB), scenario.archive, [("x", model)])
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], model, own_model=model)
    scenario.cosign_all()
    assert scenario.standing(name).reason == "registered_before_publication"


def test_standing_without_pinned_ledger_is_at_most_self_attested(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], model + b" tuned", own_model=model)
    scenario.run_council()
    view, judge = scenario.view(), SubstringJudge()
    pinned = resolve_dispute(view, [name], scenario.archive, judge).standings[0]
    unpinned = resolve_dispute(view, [name], scenario.archive, judge, pinned=False).standings[0]
    assert pinned.standing == "supported" and "2026-09-21T" in pinned.sentence
    assert (unpinned.standing, unpinned.reason) == ("self_attested", "checkpoint_not_pinned")


def test_sentences_do_not_claim_absence_and_contain_no_posix_time() -> None:
    sentences = {reason: sentence for reason, (_, sentence) in REASONS.items()}
    assert "does not show that the model is unmarked" in sentences["not_in_the_weights"]
    assert not [text for text in sentences.values() if "is not in the" in text or "POSIX" in text]
