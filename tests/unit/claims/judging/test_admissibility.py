"""Reasons that make a claim inadmissible, each with the standing that follows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from mtlsign.claims import owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Publish, Ref
from mtlsign.errors import ClaimError
from tests.unit.claims.scenario import ALICE, BOB, ClaimScenario, keyed_opening, kit_and_model

H = bytes([7]) * 32


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no_publication", {"publish": Ref(1, H)}),
        ("no_publication", {"publish": Ref(0, H)}),
        ("claim_before_publication", {"publish": Ref(99, H)}),
        ("signer_mismatch", {"signer": BOB.public_key}),
        ("signer_mismatch", {"opening": keyed_opening(BOB)}),
        ("bad_opening", {"opening": replace(keyed_opening(ALICE), signature=bytes(64))}),
        ("key_not_committed", {"opening": keyed_opening(ALICE, "another")}),
        ("key_not_committed", {"key_salt": H}),
        ("key_not_committed", {"key_index": 1}),
        ("key_not_committed", {"key_path": (H,)}),
        ("head_not_committed", {"heads": (H,)}),
        ("head_not_committed", {"heads_salt": H}),
        ("head_not_committed", {"heads": (None, None)}),
        ("model_not_committed", {"model": H}),
        ("model_not_committed", {"model_salt": H}),
        ("no_registration", {"register": Ref(2, H)}),
        ("no_registration", {"suspect": H}),
        ("no_registration", {"register": Ref(1, H)}),
    ],
)
def test_inadmissibility_reasons_of_changed_claim_name_the_reason(
    scenario: ClaimScenario, reason: str, change: dict[str, Any]
) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    _, good = owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model + b"!", own_model=model)
    signer = BOB if change.get("signer") == BOB.public_key else ALICE
    if reason == "claim_before_publication":
        change = {"publish": Ref(good.publish.index + 50, good.publish.leaf)}
    changed = replace(good, **change, time=5)
    index = scenario.ledger.append(sign_statement(changed, signer))
    scenario.run_council()
    result = scenario.standing(str(index))
    codes = set(scenario.inadmissibility_codes(str(index)))
    assert result.standing == "not_supported" and reason in codes and result.reason in codes
    tally = scenario.tally(str(index))
    assert tally.outcome == "inadmissible" and tally.counts == {"inadmissible": 5}


def test_inadmissibility_reasons_of_claim_before_its_publication_name_no_publication(
    scenario: ClaimScenario,
) -> None:
    """The publication is appended after the claim, so the reference to it is a guess and has no effect."""
    kit, model = kit_and_model(ALICE)
    alice = scenario.owner(ALICE)
    registration = owner.register(alice, scenario.archive, [("x", model)])
    other = ClaimScenario(scenario.folder / "other", ["1"])
    owner.publish(other.owner(ALICE), [kit])
    _, elsewhere = owner.claim(other.owner(ALICE), [kit], other.archive, model, own_model=model)
    early = replace(elsewhere, ledger=scenario.view().origin, register=registration, publish=Ref(3, H))
    index = scenario.ledger.append(sign_statement(early, ALICE))
    owner.publish(alice, [kit])
    scenario.cosign_all()
    result = scenario.standing(str(index))
    assert result.standing == "not_supported" and result.reason == "no_publication"


def test_opened_key_for_model_registered_later_is_inadmissible(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    alice = scenario.owner(ALICE)
    owner.publish(alice, [kit])
    early = model + b" early"
    owner.register(alice, scenario.archive, [("early", early)])
    first = scenario.claim(ALICE, [kit], model + b" one", own_model=model)
    # The key is public now: any party can embed it into another model.
    framed = b"carol's model with " + kit.opening.key().hex().encode()
    with pytest.raises(ClaimError, match="spent"):
        scenario.claim(ALICE, [kit], framed)
    view = scenario.view()
    _, good = find_claim(view, first)
    late = owner.register(alice, scenario.archive, [("framed", framed)])
    later_claim = replace(good, register=late, suspect=scenario.archive.put(framed))
    index = scenario.ledger.append(sign_statement(later_claim, ALICE))
    second = scenario.claim(ALICE, [kit], early)  # registered in time
    scenario.cosign_all()
    assert scenario.standing(str(index)).reason == "opened_before_registered"
    assert scenario.standing(first).standing == scenario.standing(second).standing == "supported"


def test_opened_key_leaked_by_another_party_is_spent(scenario: ClaimScenario) -> None:
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    _, good = owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model, own_model=model)
    fresh = ClaimScenario(scenario.folder / "fresh")
    alice = fresh.owner(ALICE)
    owner.publish(alice, [kit])
    leak = replace(good, signer=BOB.public_key, ledger=fresh.view().origin)
    fresh.ledger.append(sign_statement(leak, BOB))
    name = fresh.claim(ALICE, [kit], model + b" later", own_model=model)
    fresh.cosign_all()
    assert fresh.standing(name).reason == "opened_before_registered"


def test_several_keys_are_opened_in_order_one_per_suspect(scenario: ClaimScenario) -> None:
    kits, model = [], b""
    openings = [keyed_opening(ALICE, f"k{i}") for i in range(3)]
    model = b"model " + b" ".join(o.key().hex().encode() for o in openings)
    base, _ = kit_and_model(ALICE)
    digest = hashlib.sha256(model).hexdigest()
    kits = [replace(base, opening=o, info={"model_digest": digest}) for o in openings]
    alice = scenario.owner(ALICE)
    _, published = owner.publish(alice, kits)
    assert published.keys_count == 3
    used = []
    for i in range(3):
        entry, made = owner.claim(alice, kits, scenario.archive, model + b" %d" % i, own_model=model)
        used.append(made.key_index)
        scenario.cosign_all()
        assert scenario.standing(str(entry.index)).standing == "supported"
    assert used == [0, 1, 2]
    with pytest.raises(ClaimError, match="All 3 keys"):
        owner.claim(alice, kits, scenario.archive, model + b" 4", own_model=model)
    other = ClaimScenario(scenario.folder / "other")
    owner.publish(other.owner(ALICE), kits)
    _, first = owner.claim(other.owner(ALICE), kits, other.archive, model + b" 0", own_model=model)
    publication = find_claim(other.view(), "3")[1]
    nonce = other.view().at(publication.publish, Publish).nonce  # type: ignore[union-attr]
    hidden = [
        commitments.commit_key(commitments.derive_salt(ALICE.kit_key, nonce, "key", o.key()), o.key())
        for o in openings
    ]
    registration = owner.register(other.owner(ALICE), other.archive, [("x", model + b" x")])
    jump = replace(
        first, register=registration, suspect=other.archive.put(model + b" x"), opening=openings[2],
        key_index=2, key_salt=commitments.derive_salt(ALICE.kit_key, nonce, "key", openings[2].key()),
        key_path=tuple(commitments.key_path(hidden, 2)),
    )  # fmt: skip
    index = other.ledger.append(sign_statement(jump, ALICE))
    assert other.inadmissibility_codes(str(index)) == ["key_out_of_order"]


def test_opened_key_copied_from_another_ledger_is_spent(scenario: ClaimScenario) -> None:
    """Any party can append the exact bytes of a claim on another ledger; they make the key public here."""
    kit, model = kit_and_model(ALICE)
    owner.publish(scenario.owner(ALICE), [kit])
    entry, _ = owner.claim(scenario.owner(ALICE), [kit], scenario.archive, model, own_model=model)
    fresh = ClaimScenario(scenario.folder / "fresh")
    owner.publish(fresh.owner(ALICE), [kit])
    fresh.ledger.append(scenario.ledger.get(entry.index))
    framed = b"carol's model with " + kit.opening.key().hex().encode()
    name = fresh.claim(ALICE, [kit], framed, own_model=model)
    fresh.cosign_all()
    assert fresh.standing(name).reason == "opened_before_registered"
