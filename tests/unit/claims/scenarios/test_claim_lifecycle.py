"""The complete protocol on SQLite: publish, register, claim, five votes, tally and standing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtlsign.claims import owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Membership, Publish, Register, Vote
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model, make_identity


def test_claim_lifecycle_with_five_votes_is_in_the_weights(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    alice = scenario.owner(ALICE)
    entry, publication = owner.publish(alice, [kit], licence="MIT", recipient="Bob & Co")
    assert owner.publish(alice, [kit], licence="MIT", recipient="Bob & Co") == (
        entry,
        publication,
    )  # a retry
    assert scenario.view().time(entry.index) is None
    scenario.cosign_all()
    stolen = model + b" tuned"
    name = scenario.claim(ALICE, [kit], stolen, own_model=model)
    assert scenario.claim(ALICE, [kit], stolen, own_model=model) == name
    assert (
        scenario.standing(name).standing == "supported"
    )  # published under a confirmed checkpoint, no votes yet
    assert scenario.tally(name).outcome == "open"
    view = scenario.run_council()
    tally = scenario.tally(name)
    assert tally.outcome == "accepted" and tally.counts == {"accepted": 5} and tally.threshold == 3
    result = scenario.standing(name)
    assert (result.standing, result.reason) == ("supported", "accepted")
    times = [view.time(i) for i in view.entries]
    assert None not in times and times == sorted(times) and not view.warnings  # type: ignore[type-var]
    assert [type(e.statement) for e in view.entries.values()] == [
        Membership,
        Publish,
        Register,
        Claim,
        *[Vote] * 5,
    ]


def test_claim_with_early_commitment_and_later_model_is_not_supported(scenario: ClaimScenario) -> None:
    """An attacker commits a key early for another model and later embeds it into the owner's model."""
    attacker = make_identity("attacker")
    kit, junk = kit_and_model(attacker, "hoard")
    owner.publish(scenario.owner(attacker), [kit])
    alice_kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [alice_kit])
    scenario.cosign_all()
    planted = model + b" and " + kit.opening.key().hex().encode()
    later = replace(kit, info={"model_digest": scenario.archive.put(planted).hex()})
    with pytest.raises(ClaimError, match="not published"):
        scenario.claim(attacker, [later], planted)
    rival_claim = scenario.claim(attacker, [kit], planted, own_model=junk)
    entry, good = find_claim(scenario.view(), rival_claim)
    forged = replace(good, model=scenario.archive.put(planted), time=9)
    index = scenario.ledger.append(sign_statement(forged, attacker))
    own_claim = scenario.claim(ALICE, [alice_kit], planted, own_model=model)
    scenario.run_council()
    assert scenario.standing(str(index)).reason == "model_not_committed"
    assert scenario.standing(own_claim, rival_claim).standing == "supported"
    assert entry.index < index
