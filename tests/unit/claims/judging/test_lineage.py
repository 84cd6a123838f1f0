"""Edges between disputed claims, and exhibits."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from mtlsign.claims import owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.lineage import _is_timestamped
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Exhibit, Publish, Ref
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE, BOB, ClaimScenario, keyed_opening, kit_and_model, make_identity


def test_edge_of_remarked_model_descends_from_the_first_mark(scenario: ClaimScenario) -> None:
    own_kit, model = kit_and_model(ALICE)
    attacker = make_identity("attacker")
    attacker_kit, remarked = kit_and_model(
        attacker, inherited=[own_kit.opening.key()]
    )  # stolen model with a second watermark
    owner.publish(scenario.owner(ALICE), [own_kit])
    scenario.cosign_all()
    owner.publish(scenario.owner(attacker), [attacker_kit])
    a = scenario.claim(ALICE, [own_kit], remarked, own_model=model)
    b = scenario.claim(attacker, [attacker_kit], remarked, own_model=remarked)
    scenario.run_council()
    result = scenario.dispute(a, b)
    assert [(e.kind, e.ancestor, e.descendant) for e in result.edges] == [("descends", a, b)]
    assert {s.claim: s.standing for s in result.standings} == {a: "supported", b: "inherited"}
    assert set(result.matrix[a]) == set(result.matrix[b]) and len(result.matrix[a]) == 2
    assert scenario.standing(b, a).reason == "built_on_a_marked_model"


@pytest.mark.parametrize("same_checkpoint", [False, True])
def test_edge_with_both_keys_in_both_models_depends_on_the_order(
    scenario: ClaimScenario, same_checkpoint: bool
) -> None:
    first, second = keyed_opening(ALICE), keyed_opening(BOB)
    a_kit, a_model = kit_and_model(ALICE, inherited=[second.key()])
    b_kit, b_model = kit_and_model(BOB, inherited=[first.key()])
    owner.publish(scenario.owner(ALICE), [a_kit])
    if not same_checkpoint:
        scenario.cosign_all()
    owner.publish(scenario.owner(BOB), [b_kit])
    a = scenario.claim(ALICE, [a_kit], b"x" + a_model, own_model=a_model)
    b = scenario.claim(BOB, [b_kit], b"x" + a_model, own_model=b_model)
    scenario.cosign_all()
    result = scenario.dispute(a, b)
    if same_checkpoint:
        assert {s.standing for s in result.standings} == {"undecided"} and result.edges[0].kind == "undecided"
    else:
        assert [s.standing for s in result.standings] == ["supported", "prior_art"]
        assert result.edges[0].kind == "earlier" and result.edges[0].ancestor == a


def test_edge_of_claims_without_shared_keys_is_unrelated(scenario: ClaimScenario) -> None:
    (a_kit, a_model), (b_kit, b_model) = kit_and_model(ALICE), kit_and_model(BOB)
    for who, kit in ((ALICE, a_kit), (BOB, b_kit)):
        owner.publish(scenario.owner(who), [kit])
    a = scenario.claim(ALICE, [a_kit], a_model + b_model, own_model=a_model)  # average of both models
    b = scenario.claim(BOB, [b_kit], a_model + b_model, own_model=b_model)
    scenario.cosign_all()
    result = scenario.dispute(a, b)
    assert result.edges[0].kind == "unrelated"
    assert [s.standing for s in result.standings] == ["supported"] * 2


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("before publication", "prior_art"),
        ("before registration", "inherited"),
        ("too late", "supported"),
    ],
)
def test_exhibit_changes_standing_by_time_of_its_timestamp(
    scenario: ClaimScenario, when: str, expected: str
) -> None:
    accused = scenario.owner(make_identity("accused"))
    kit, model = kit_and_model(ALICE)
    licensed = model + b" licensed base"
    if when == "before publication":
        owner.register(accused, scenario.archive, [("base", licensed)])
    owner.publish(scenario.owner(ALICE), [kit])
    if when == "before registration":
        own, _ = kit_and_model(accused.identity)
        digest = scenario.archive.put(licensed)
        owner.publish(accused, [replace(own, info={"model_digest": digest.hex()})])
    name = scenario.claim(ALICE, [kit], licensed + b" tuned", own_model=model)
    if when == "too late":
        owner.register(accused, scenario.archive, [("base", licensed)])
    owner.exhibit(accused, scenario.archive, name, licensed)
    scenario.cosign_all()
    assert scenario.standing(name).standing == expected


def test_exhibit_without_key_or_timestamp_has_no_effect(scenario: ClaimScenario) -> None:
    accused = scenario.owner(make_identity("accused"))
    kit, model = kit_and_model(ALICE)
    owner.register(accused, scenario.archive, [("clean", b"clean")])
    owner.publish(scenario.owner(ALICE), [kit])
    name = scenario.claim(ALICE, [kit], model + b"!", own_model=model)
    owner.exhibit(accused, scenario.archive, name, b"clean")  # the key is not accepted on it
    with pytest.raises(ClaimError, match="timestamps"):
        owner.exhibit(accused, scenario.archive, name, b"never seen")
    entry, _ = find_claim(scenario.view(), name)
    forged = Exhibit(
        signer=accused.identity.public_key, ledger=scenario.view().origin, time=0, claim=entry.ref,
        stamp=Ref(1, scenario.view().entries[1].leaf), model=scenario.archive.put(model), salt=None,
    )  # fmt: skip
    scenario.ledger.append(sign_statement(forged, accused.identity))
    scenario.cosign_all()
    assert scenario.standing(name).standing == "supported"


def test_exhibit_with_copied_commitment_has_no_effect(scenario: ClaimScenario) -> None:
    """Another party copies the model commitment of a publication and uses the salt that the claim opens."""
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    publication = scenario.view().entries[1].statement
    copier = make_identity("copier")
    assert isinstance(publication, Publish)
    stamp = scenario.ledger.append(
        sign_statement(replace(publication, signer=copier.public_key, licence="mine"), copier)
    )
    name = scenario.claim(ALICE, [kit], model + b" stolen", own_model=model)
    entry, claim = find_claim(scenario.view(), name)
    exhibit = Exhibit(
        signer=copier.public_key, ledger=scenario.view().origin, time=0, claim=entry.ref,
        stamp=scenario.view().entries[stamp].ref, model=claim.model, salt=claim.model_salt,
    )  # fmt: skip
    scenario.ledger.append(sign_statement(exhibit, copier))
    scenario.cosign_all()
    assert not _is_timestamped(scenario.view(), exhibit) and scenario.standing(name).standing == "supported"


def test_exhibit_timestamped_by_the_claimant_has_no_effect(scenario: ClaimScenario) -> None:
    """The claimant's earlier suspect and committed model carry the key anyway."""
    kit, model = kit_and_model(ALICE)
    attacker = scenario.owner(make_identity("attacker"))
    owner.publish(scenario.owner(ALICE), [kit])
    scenario.cosign_all()
    first, second = model + b" first", model + b" second"
    owner.register(scenario.owner(ALICE), scenario.archive, [("first", first)])
    owner.register(attacker, scenario.archive, [("committed model", model)])
    name = scenario.claim(ALICE, [kit], second, own_model=model)
    for exhibited in (first, model):
        owner.exhibit(attacker, scenario.archive, name, exhibited)
    scenario.cosign_all()
    assert scenario.standing(name).standing == "supported"


@pytest.mark.parametrize("case", ["withheld", "broken", "unmarked"])
def test_rival_without_verifiable_committed_model_does_not_change_standing(
    scenario: ClaimScenario, case: str
) -> None:
    own_kit, model = kit_and_model(ALICE)
    attacker = make_identity("attacker")
    rival_kit, junk = kit_and_model(attacker)
    rival_model = {"withheld": junk, "broken": b"broken", "unmarked": b"unmarked"}[case]
    rival_kit = replace(rival_kit, info={"model_digest": hashlib.sha256(rival_model).hexdigest()})
    owner.publish(scenario.owner(ALICE), [own_kit])
    owner.publish(scenario.owner(attacker), [rival_kit])
    both = model + junk
    own_claim = scenario.claim(ALICE, [own_kit], both, own_model=model)
    rival_claim = scenario.claim(
        attacker, [rival_kit], both, own_model=None if case == "withheld" else rival_model
    )
    scenario.run_council()
    result = scenario.dispute(own_claim, rival_claim)
    assert result.edges[0].kind == "unrelated"
    assert result.standings[0].standing == "supported"
    assert result.standings[1].standing == ("not_supported" if case == "unmarked" else "not_verifiable")
