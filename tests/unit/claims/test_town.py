"""The whole protocol on SQLite: publish → steal → register → claim → five votes → tally → lineage, and every
way in which a claim can fail, each with its standing and reason."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import owner
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import Tally, tally_votes
from mtlsign.claims.judging.lineage import _is_timestamped
from mtlsign.claims.judging.standings import REASONS, STANDINGS, Standing
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Exhibit, Membership, Publish, Ref, Register, Vote
from mtlsign.errors import ClaimError, KeyMaterialError, LedgerError
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import ALICE, BOB, Town, keyed_opening, kit_of, person


@pytest.fixture
def town(tmp_path: Path) -> Town:
    return Town(tmp_path)


def counted(town: Town, name: str) -> Tally:
    view = town.view()
    return tally_votes(view, *find_claim(view, name))


def claim_of(town: Town, who: Identity, kits: Any, suspect: bytes, **more: Any) -> str:
    return owner.claim(town.owner(who), kits, town.archive, suspect, **more)[0].leaf.hex()


def standing(town: Town, name: str, *others: str) -> Standing:
    found = town.dispute(name, *others)
    assert {s.standing for s in found.standings} <= set(STANDINGS)
    assert all(s.sentence.endswith(".") and "{" not in s.sentence for s in found.standings)
    found.to_json()
    return found.standings[0]


def test_the_whole_way(town: Town) -> None:
    kit, model = kit_of(ALICE)
    alice = town.owner(ALICE)
    entry, said = owner.publish(alice, [kit], licence="MIT", recipient="Bob & Co")
    assert owner.publish(alice, [kit], licence="MIT", recipient="Bob & Co") == (entry, said)  # a retry
    assert town.view().time(entry.index) is None
    town.attest()
    stolen = model + b" tuned"
    name = claim_of(town, ALICE, [kit], stolen, marked=model)
    assert claim_of(town, ALICE, [kit], stolen, marked=model) == name
    assert standing(town, name).standing == "in_the_weights"  # published under a counted head, no votes yet
    assert counted(town, name).outcome == "open"
    view = town.vote()
    found = counted(town, name)
    assert found.outcome == "accepted" and found.counts == {"accepted": 5} and found.threshold == 3
    result = standing(town, name)
    assert (result.standing, result.reason) == ("in_the_weights", "accepted")
    times = [view.time(i) for i in view.entries]
    assert None not in times and times == sorted(times) and not view.remarks  # type: ignore[type-var]
    assert [type(e.statement) for e in view.entries.values()] == [
        Membership,
        Publish,
        Register,
        Claim,
        *[Vote] * 5,
    ]


def test_one_round_of_five_members_is_enough(town: Town) -> None:
    """`jobs/council.py --once` by five members, one after the other, and nothing else."""
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    name = claim_of(town, ALICE, [kit], model + b" tuned", marked=model)
    from mtlsign.claims.judging.council import run_member_round
    from tests.unit.claims.scenario import ByName

    for member in town.members:
        run_member_round(
            member, town.ledger, town.archive, ByName(), memory=town.memory(member), clock=town.clock
        )
    found = counted(town, name)
    assert found.outcome == "accepted" and found.counts == {"accepted": 3}
    assert [b.why for b in found.ballots if not b.counts] == ["is not yet under a head that counts"] * 2
    assert standing(town, name).standing == "in_the_weights"


def test_a_ledger_of_ones_own_is_self_attested(tmp_path: Path) -> None:
    town = Town(tmp_path, ["alice"])
    kit, model = kit_of(ALICE)
    entry, _ = owner.publish(town.owner(ALICE), [kit])
    assert town.view().time(entry.index) is not None  # a council of one co-signs as it appends
    name = claim_of(town, ALICE, [kit], model, marked=model)
    assert standing(town, name).standing == "self_attested"
    new = Membership(
        signer=ALICE.public_key, ledger=town.view().origin, time=0, previous=Ref(0, town.view().origin),
        members=tuple(sorted([BOB.public_key, ALICE.public_key])), threshold=2,
    )  # fmt: skip
    town.ledger.append(sign_statement(new, ALICE))
    town.witness(ALICE).step()
    town.witness(BOB).step()
    assert (
        standing(town, name).standing == "self_attested"
    )  # later co-signers do not change who was there then


FaultCase = tuple[str, dict[str, Any]]
H = bytes([7]) * 32


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no_publication", {"publish": Ref(1, H)}),
        ("no_publication", {"publish": Ref(0, H)}),
        ("claim_before_publication", {"publish": Ref(99, H)}),
        ("somebody_elses_key", {"signer": BOB.public_key}),
        ("somebody_elses_key", {"opening": keyed_opening(BOB)}),
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
def test_what_does_not_fit_the_commitment_is_not_supported(
    town: Town, reason: str, change: dict[str, Any]
) -> None:
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    _, good = owner.claim(town.owner(ALICE), [kit], town.archive, model + b"!", marked=model)
    signer = BOB if change.get("signer") == BOB.public_key else ALICE
    if reason == "claim_before_publication":
        change = {"publish": Ref(good.publish.index + 50, good.publish.leaf)}
    bad = replace(good, **change, time=5)
    index = town.ledger.append(sign_statement(bad, signer))
    town.vote()
    result = standing(town, str(index))
    codes = {f.code for f in _faults(town, index)}
    assert result.standing == "not_supported" and reason in codes and result.reason in codes
    found = counted(town, str(index))
    assert found.outcome == "inadmissible" and found.counts == {"inadmissible": 5}


def _faults(town: Town, index: int) -> Any:
    from mtlsign.claims.judging.admissibility import inadmissibility_reasons

    view = town.view()
    return inadmissibility_reasons(view, *find_claim(view, str(index)))


def test_a_claim_before_its_own_publication(town: Town) -> None:
    """The publication is appended after the claim: its reference can only be guessed, and does not count."""
    kit, model = kit_of(ALICE)
    alice = town.owner(ALICE)
    stamp = owner.register(alice, town.archive, [("x", model)])
    other = Town(town.folder / "other", ["1"])
    owner.publish(other.owner(ALICE), [kit])
    _, elsewhere = owner.claim(other.owner(ALICE), [kit], other.archive, model, marked=model)
    early = replace(elsewhere, ledger=town.view().origin, register=stamp, publish=Ref(3, H))
    index = town.ledger.append(sign_statement(early, ALICE))
    owner.publish(alice, [kit])
    town.attest()
    result = standing(town, str(index))
    assert result.standing == "not_supported" and result.reason == "no_publication"


def test_a_statement_of_another_ledger_means_nothing_here(town: Town) -> None:
    kit, _ = kit_of(ALICE)
    other = Town(town.folder / "other", ["1"])
    entry, _ = owner.publish(other.owner(ALICE), [kit])
    index = town.ledger.append(other.ledger.get(entry.index))
    again = town.ledger.append(other.ledger.get(0))  # another council's founding
    view = town.view()
    assert (
        view.entries[index].problem == "was made for another ledger" and view.entries[index].statement is None
    )
    assert (
        view.entries[again].problem == "was made for another ledger" or view.entries[again].statement is None
    )
    assert len(view.councils) == 1


def test_an_opened_key_supports_only_what_was_registered_before(town: Town) -> None:
    kit, model = kit_of(ALICE)
    alice = town.owner(ALICE)
    owner.publish(alice, [kit])
    early = model + b" early"
    owner.register(alice, town.archive, [("early", early)])
    first = claim_of(town, ALICE, [kit], model + b" one", marked=model)
    # everybody has the key now: Bob embeds it into Carol's model and Alice is tempted
    framed = b"carol's model with " + kit.opening.key().hex().encode()
    with pytest.raises(ClaimError, match="spent"):
        claim_of(town, ALICE, [kit], framed)
    view = town.view()
    _, good = find_claim(view, first)
    late = owner.register(alice, town.archive, [("framed", framed)])
    bad = replace(good, register=late, suspect=town.archive.put(framed))
    index = town.ledger.append(sign_statement(bad, ALICE))
    second = claim_of(town, ALICE, [kit], early)  # registered in time
    town.attest()
    assert standing(town, str(index)).reason == "opened_before_registered"
    assert standing(town, first).standing == standing(town, second).standing == "in_the_weights"


def test_a_key_leaked_into_the_ledger_by_anybody_is_spent(town: Town) -> None:
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    _, good = owner.claim(town.owner(ALICE), [kit], town.archive, model, marked=model)
    fresh = Town(town.folder / "fresh")
    alice = fresh.owner(ALICE)
    owner.publish(alice, [kit])
    leak = replace(good, signer=BOB.public_key, ledger=fresh.view().origin)
    fresh.ledger.append(sign_statement(leak, BOB))
    name = claim_of(fresh, ALICE, [kit], model + b" later", marked=model)
    fresh.attest()
    assert standing(fresh, name).reason == "opened_before_registered"


def test_several_keys_open_in_their_order_one_per_dispute(town: Town) -> None:
    kits, model = [], b""
    openings = [keyed_opening(ALICE, f"k{i}") for i in range(3)]
    model = b"model " + b" ".join(o.key().hex().encode() for o in openings)
    base, _ = kit_of(ALICE)
    digest = hashlib.sha256(model).hexdigest()
    kits = [replace(base, opening=o, info={"model_digest": digest}) for o in openings]
    alice = town.owner(ALICE)
    _, said = owner.publish(alice, kits)
    assert said.keys_count == 3
    used = []
    for i in range(3):
        entry, made = owner.claim(alice, kits, town.archive, model + b" %d" % i, marked=model)
        used.append(made.key_index)
        town.attest()
        assert standing(town, str(entry.index)).standing == "in_the_weights"
    assert used == [0, 1, 2]
    with pytest.raises(ClaimError, match="all 3 keys"):
        owner.claim(alice, kits, town.archive, model + b" 4", marked=model)
    other = Town(town.folder / "other")
    owner.publish(other.owner(ALICE), kits)
    _, first = owner.claim(other.owner(ALICE), kits, other.archive, model + b" 0", marked=model)
    publication = find_claim(other.view(), "3")[1]
    nonce = other.view().at(publication.publish, Publish).nonce  # type: ignore[union-attr]
    hidden = [
        commitments.commit_key(commitments.derive_salt(ALICE.kit_key, nonce, "key", o.key()), o.key())
        for o in openings
    ]
    stamp = owner.register(other.owner(ALICE), other.archive, [("x", model + b" x")])
    jump = replace(
        first, register=stamp, suspect=other.archive.put(model + b" x"), opening=openings[2], key_index=2,
        key_salt=commitments.derive_salt(ALICE.kit_key, nonce, "key", openings[2].key()),
        key_path=tuple(commitments.key_path(hidden, 2)),
    )  # fmt: skip
    index = other.ledger.append(sign_statement(jump, ALICE))
    assert [f.code for f in _faults(other, index)] == ["key_out_of_order"]


def test_a_hoarded_commitment_on_a_later_model(town: Town) -> None:
    """The thief commits a key early, for a model of his own, and embeds it later into the owner's model."""
    thief = person("thief")
    kit, junk = kit_of(thief, "hoard")
    owner.publish(town.owner(thief), [kit])
    alice_kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [alice_kit])
    town.attest()
    planted = model + b" and " + kit.opening.key().hex().encode()
    later = replace(kit, info={"model_digest": town.archive.put(planted).hex()})
    with pytest.raises(ClaimError, match="not published"):
        claim_of(town, thief, [later], planted)
    theirs = claim_of(town, thief, [kit], planted, marked=junk)
    entry, good = find_claim(town.view(), theirs)
    lie = replace(good, model=town.archive.put(planted), time=9)
    index = town.ledger.append(sign_statement(lie, thief))
    ours = claim_of(town, ALICE, [alice_kit], planted, marked=model)
    town.vote()
    assert standing(town, str(index)).reason == "model_not_committed"
    assert standing(town, ours, theirs).standing == "in_the_weights"
    assert entry.index < index


def test_a_commitment_to_an_unmarked_model_is_worth_nothing(town: Town) -> None:
    kit, model = kit_of(ALICE)
    empty = b"nothing in here"
    hollow = replace(kit, info={"model_digest": town.archive.put(empty).hex()})
    owner.publish(town.owner(ALICE), [hollow])
    name = claim_of(town, ALICE, [hollow], model, marked=empty)
    town.attest()
    assert standing(town, name).reason == "committed_model_unmarked"


def test_wrong_key_broken_suspect_and_missing_evidence(town: Town) -> None:
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    names = {}
    alice = town.owner(ALICE)
    for about, suspect in (("innocent", b"innocent"), ("broken", b"broken model")):
        owner.register(alice, town.archive, [(about, suspect)])
    for about, suspect in (("innocent", b"innocent"), ("broken", b"broken model")):
        names[about] = claim_of(town, ALICE, [kit], suspect, marked=model)
    town.vote()
    assert standing(town, names["innocent"]).reason == "not_in_the_weights"
    assert counted(town, names["innocent"]).outcome == "rejected"
    assert standing(town, names["broken"]).standing == "not_verifiable"
    assert counted(town, names["broken"]).outcome == "not_verifiable"
    (town.folder / "archive" / "blobs" / hashlib.sha256(b"innocent").hexdigest()).unlink()
    assert standing(town, names["innocent"]).standing == "not_verifiable"
    town.archive.places[0].delete("blobs/" + hashlib.sha256(b"reference").hexdigest())
    assert standing(town, names["broken"]).reason == "evidence_missing"


def test_an_archive_that_lies_is_noticed(town: Town) -> None:
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    name = claim_of(town, ALICE, [kit], b"innocent", marked=model)
    town.archive.places[0].write("blobs/" + hashlib.sha256(b"innocent").hexdigest(), model)
    town.attest()
    assert standing(town, name).standing == "not_verifiable"


def test_a_free_head_needs_a_commitment_and_frames_nobody(town: Town) -> None:
    """A trained head can be made to fit a rival's published model: that makes no rival a descendant."""
    ours, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [ours])
    forger = person("forger")
    kit, junk = kit_of(forger, head=b"a head")
    owner.publish(town.owner(forger), [kit])
    both = model + kit.opening.key().hex().encode()  # the forger's head "reads" its key out of anything
    theirs = claim_of(town, forger, [kit], both, marked=junk)
    mine = claim_of(town, ALICE, [ours], both, marked=model)
    town.vote()
    assert counted(town, theirs).outcome == "needs_commitment"
    assert standing(town, theirs).reason == "free_head"
    found = town.dispute(mine, theirs)
    assert found.standings[0].standing == "in_the_weights" and found.edges[0].kind == "unrelated"


def test_lineage_of_a_thief_who_marks_again(town: Town) -> None:
    ours, model = kit_of(ALICE)
    thief = person("thief")
    theirs, remarked = kit_of(thief, others=[ours.opening.key()])  # the stolen model with a second mark
    owner.publish(town.owner(ALICE), [ours])
    town.attest()
    owner.publish(town.owner(thief), [theirs])
    a = claim_of(town, ALICE, [ours], remarked, marked=model)
    b = claim_of(town, thief, [theirs], remarked, marked=remarked)
    town.vote()
    found = town.dispute(a, b)
    assert [(e.kind, e.ancestor, e.descendant) for e in found.edges] == [("descends", a, b)]
    assert {s.claim: s.standing for s in found.standings} == {a: "in_the_weights", b: "inherited"}
    assert set(found.matrix[a]) == set(found.matrix[b]) and len(found.matrix[a]) == 2
    assert standing(town, b, a).reason == "built_on_a_marked_model"


@pytest.mark.parametrize("together", [False, True])
def test_both_keys_in_both_models(town: Town, together: bool) -> None:
    first, second = keyed_opening(ALICE), keyed_opening(BOB)
    a_kit, a_model = kit_of(ALICE, others=[second.key()])
    b_kit, b_model = kit_of(BOB, others=[first.key()])
    owner.publish(town.owner(ALICE), [a_kit])
    if not together:
        town.attest()
    owner.publish(town.owner(BOB), [b_kit])
    a = claim_of(town, ALICE, [a_kit], b"x" + a_model, marked=a_model)
    b = claim_of(town, BOB, [b_kit], b"x" + a_model, marked=b_model)
    town.attest()
    found = town.dispute(a, b)
    if together:
        assert {s.standing for s in found.standings} == {"undecided"} and found.edges[0].kind == "undecided"
    else:
        assert [s.standing for s in found.standings] == ["in_the_weights", "prior_art"]
        assert found.edges[0].kind == "earlier" and found.edges[0].ancestor == a


def test_unrelated_claims(town: Town) -> None:
    (a_kit, a_model), (b_kit, b_model) = kit_of(ALICE), kit_of(BOB)
    for who, kit in ((ALICE, a_kit), (BOB, b_kit)):
        owner.publish(town.owner(who), [kit])
    a = claim_of(town, ALICE, [a_kit], a_model + b_model, marked=a_model)  # a soup of both
    b = claim_of(town, BOB, [b_kit], a_model + b_model, marked=b_model)
    town.attest()
    found = town.dispute(a, b)
    assert found.edges[0].kind == "unrelated"
    assert [s.standing for s in found.standings] == ["in_the_weights"] * 2


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("before publication", "prior_art"),
        ("before registration", "inherited"),
        ("too late", "in_the_weights"),
    ],
)
def test_an_exhibit(town: Town, when: str, expected: str) -> None:
    accused = town.owner(person("accused"))
    kit, model = kit_of(ALICE)
    licensed = model + b" licensed base"
    if when == "before publication":
        owner.register(accused, town.archive, [("base", licensed)])
    owner.publish(town.owner(ALICE), [kit])
    if when == "before registration":
        own, _ = kit_of(accused.identity)
        digest = town.archive.put(licensed)
        owner.publish(accused, [replace(own, info={"model_digest": digest.hex()})])
    name = claim_of(town, ALICE, [kit], licensed + b" tuned", marked=model)
    if when == "too late":
        owner.register(accused, town.archive, [("base", licensed)])
    owner.exhibit(accused, town.archive, name, licensed)
    town.attest()
    assert standing(town, name).standing == expected


def test_exhibits_that_show_nothing(town: Town) -> None:
    accused = town.owner(person("accused"))
    kit, model = kit_of(ALICE)
    owner.register(accused, town.archive, [("clean", b"clean")])
    owner.publish(town.owner(ALICE), [kit])
    name = claim_of(town, ALICE, [kit], model + b"!", marked=model)
    owner.exhibit(accused, town.archive, name, b"clean")  # the key does not pass on it
    with pytest.raises(ClaimError, match="stamped"):
        owner.exhibit(accused, town.archive, name, b"never seen")
    entry, _ = find_claim(town.view(), name)
    lie = Exhibit(
        signer=accused.identity.public_key, ledger=town.view().origin, time=0, claim=entry.ref,
        stamp=Ref(1, town.view().entries[1].leaf), model=town.archive.put(model), salt=None,
    )  # fmt: skip
    town.ledger.append(sign_statement(lie, accused.identity))
    town.attest()
    assert standing(town, name).standing == "in_the_weights"


def test_a_copied_commitment_exhibits_nothing(town: Town) -> None:
    """Somebody copies the hidden model out of our publication, waits until our claim shows the salt, and says
    that he had stamped that model."""
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    ours = town.view().entries[1].statement
    copier = person("copier")
    assert isinstance(ours, Publish)
    stamp = town.ledger.append(
        sign_statement(replace(ours, signer=copier.public_key, licence="mine"), copier)
    )
    name = claim_of(town, ALICE, [kit], model + b" stolen", marked=model)
    entry, claim = find_claim(town.view(), name)
    shown = Exhibit(
        signer=copier.public_key, ledger=town.view().origin, time=0, claim=entry.ref,
        stamp=town.view().entries[stamp].ref, model=claim.model, salt=claim.model_salt,
    )  # fmt: skip
    town.ledger.append(sign_statement(shown, copier))
    town.attest()
    assert not _is_timestamped(town.view(), shown) and standing(town, name).standing == "in_the_weights"


def test_what_the_claimant_stamped_is_no_exhibit(town: Town) -> None:
    """An earlier suspect of ours, and our own committed model, carry the key: of course."""
    kit, model = kit_of(ALICE)
    thief = town.owner(person("thief"))
    owner.publish(town.owner(ALICE), [kit])
    town.attest()
    first, second = model + b" first", model + b" second"
    owner.register(town.owner(ALICE), town.archive, [("first", first)])
    owner.register(thief, town.archive, [("our model", model)])
    name = claim_of(town, ALICE, [kit], second, marked=model)
    for shown in (first, model):
        owner.exhibit(thief, town.archive, name, shown)
    town.attest()
    assert standing(town, name).standing == "in_the_weights"


@pytest.mark.parametrize("how", ["withheld", "broken", "unmarked"])
def test_a_claim_whose_own_model_shows_nothing_blurs_nobodys_standing(town: Town, how: str) -> None:
    ours, model = kit_of(ALICE)
    thief = person("thief")
    theirs, junk = kit_of(thief)
    own = {"withheld": junk, "broken": b"broken", "unmarked": b"unmarked"}[how]
    theirs = replace(theirs, info={"model_digest": hashlib.sha256(own).hexdigest()})
    owner.publish(town.owner(ALICE), [ours])
    owner.publish(town.owner(thief), [theirs])
    both = model + junk
    mine = claim_of(town, ALICE, [ours], both, marked=model)
    other = claim_of(town, thief, [theirs], both, marked=None if how == "withheld" else own)
    town.vote()
    found = town.dispute(mine, other)
    assert found.edges[0].kind == "unrelated"
    assert found.standings[0].standing == "in_the_weights"
    assert found.standings[1].standing == ("not_supported" if how == "unmarked" else "not_verifiable")


def test_publish_refuses_what_is_not_ours_or_already_seen(town: Town) -> None:
    kit, model = kit_of(ALICE)
    with pytest.raises(KeyMaterialError, match="another identity's"):
        owner.publish(town.owner(BOB), [kit])
    with pytest.raises(ClaimError, match="same key twice"):
        owner.publish(town.owner(ALICE), [kit, kit])
    with pytest.raises(ClaimError, match="different models"):
        owner.publish(town.owner(ALICE), [kit, kit_of(ALICE, "n")[0]])
    with pytest.raises(ClaimError, match="publish"):
        claim_of(town, ALICE, [kit], model)
    assert owner.already_disclosed(town.owner(ALICE), [kit]) is None
    owner.register(town.owner(BOB), town.archive, [("seen", model)])
    assert owner.already_disclosed(town.owner(ALICE), [kit]) == 1


def test_the_key_waits_for_the_registration(town: Town) -> None:
    kit, model = kit_of(ALICE)
    owner.publish(town.owner(ALICE), [kit])
    with pytest.raises(ClaimError, match="no key was opened"):
        owner.claim(town.owner(ALICE), [kit], town.archive, model, wait=0.01)
    assert not list(town.view().all(Claim))
    town.attest()
    name = owner.claim(town.owner(ALICE), [kit], town.archive, model, wait=0.01)[1]
    assert name.register.index == 2 and len(town.view().entries) == 4


def test_a_second_founding_is_refused(town: Town) -> None:
    with pytest.raises(LedgerError, match="founded already"):
        owner.create_ledger(town.owner(BOB), [BOB.public_key])


def test_every_reason_has_a_known_standing() -> None:
    assert {standing for standing, _ in REASONS.values()} == set(STANDINGS)
