"""Operations of an owner at a ledger."""

from __future__ import annotations

import pytest

from mtlsign.claims import owner
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from tests.unit.claims.scenario import ALICE, BOB, ClaimScenario, kit_and_model


def test_publish_with_wrong_kits_is_refused(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    with pytest.raises(KeyMaterialError, match="belongs to another identity"):
        owner.publish(scenario.owner(BOB), [kit])
    with pytest.raises(ClaimError, match="have the same key"):
        owner.publish(scenario.owner(ALICE), [kit, kit])
    with pytest.raises(ClaimError, match="different models"):
        owner.publish(scenario.owner(ALICE), [kit, kit_and_model(ALICE, "n")[0]])
    with pytest.raises(ClaimError, match=r"not published .* jobs/publish"):
        scenario.claim(ALICE, [kit], model)
    assert owner.already_disclosed(scenario.owner(ALICE), [kit]) is None
    owner.register(scenario.owner(BOB), scenario.archive, [("seen", model)])
    assert owner.already_disclosed(scenario.owner(ALICE), [kit]) == 1


def test_claim_before_confirmed_registration_opens_no_key(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    with pytest.raises(ClaimError, match="no key was opened"):
        owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model, confirmation_timeout=0.01)
    assert not list(scenario.view().all(Claim))
    scenario.cosign_all()
    statement = owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model, confirmation_timeout=0.01)[
        1
    ]
    assert statement.register.index == 2 and len(scenario.view().entries) == 4


def test_create_ledger_twice_is_refused(scenario: ClaimScenario) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        owner.create_ledger(scenario.owner(BOB), [BOB.public_key])
