"""The stored ledger reads as it did, by the package and by a second reader written from `docs/claims.md`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.judging.admissibility import find_claim, inadmissibility_reasons
from mtlsign.claims.judging.council import tally_votes
from mtlsign.claims.ledger import checkpoints
from mtlsign.claims.ledger.checkpoints import Checkpoint, parse_line
from mtlsign.claims.ledger.view import LedgerView
from mtlsign.claims.statements.envelope import open_envelope
from mtlsign.claims.statements.parsing import parse
from mtlsign.claims.statements.types import Claim
from tests.conformance import reference_claim_verifier as second

PATH = Path(__file__).parent.parent.parent / "golden" / "v0" / "claims.json"


@pytest.fixture(scope="module")
def golden() -> Any:
    found = json.loads(PATH.read_text("utf-8"))
    found["rows"] = [base64.b64decode(row) for row in found["entries"]]
    return found


@pytest.fixture(scope="module")
def view(golden: Any) -> LedgerView:
    origin = merkle.leaf_hash(golden["rows"][0])
    signed = [
        (Checkpoint(origin, one["size"], bytes.fromhex(one["root"])), parse_line(one["line"]))
        for one in golden["cosignatures"]
    ]
    return LedgerView.of(golden["rows"], signed)


def test_the_package_reads_it_as_it_was_written(golden: Any, view: LedgerView) -> None:
    expected, size = golden["expected"], len(golden["rows"])
    assert view.origin.hex() == expected["origin"] and not view.remarks
    assert [e.statement.kind if e.statement else None for e in view.entries.values()] == expected["kinds"]
    assert {"publish", "register", "claim", "vote", "exhibit", "membership"} <= set(expected["kinds"])
    assert [e.leaf.hex() for e in view.entries.values()] == expected["leaves"]
    assert [view.time(i) for i in range(size)] == expected["times"]
    for index, counts in expected["tallies"].items():
        entry, claim = find_claim(view, index)
        assert (
            inadmissibility_reasons(view, entry, claim) == ()
            and tally_votes(view, entry, claim).counts == counts
        )
    for row in golden["rows"]:  # what is parsed is written again to the very bytes
        payload = open_envelope(row).payload
        assert parse(payload).payload() == payload
    head, lines = checkpoints.parse_signed_note(golden["head"].encode())
    council = view.council(head.size)
    assert len(checkpoints.cosigner_times(head, lines, council.members)) >= council.threshold
    assert checkpoints.encode_signed_note(head, lines).decode() == golden["head"]


def test_the_independent_reader_agrees(golden: Any, view: LedgerView) -> None:
    rows, expected = golden["rows"], golden["expected"]
    found = second.read(rows, golden["cosignatures"])
    assert {name: found[name] for name in ("origin", "kinds", "times", "leaves")} == {
        name: expected[name] for name in ("origin", "kinds", "times", "leaves")
    }
    for index, counts in expected["tallies"].items():
        claim = found["said"][int(index)]
        publication = found["said"][claim["predicate"]["publish"]["index"]]
        assert second.opens(claim, publication) and second.votes(found, int(index)) == counts
        other = json.loads(json.dumps(claim))
        other["predicate"]["model"]["salt"] = "00" * 32
        assert not second.opens(other, publication)
    assert second.key_of(found["said"][next(iter(view.all(Claim)))[0].index]).hex() == expected["key"]


def test_the_proofs_are_the_rfcs(golden: Any) -> None:
    rows, expected = golden["rows"], golden["expected"]
    leaves, size = [second.leaf(row) for row in rows], len(golden["rows"])
    for count, root in expected["roots"].items():
        assert second.root(leaves[: int(count)]).hex() == root
    for index, path in enumerate(golden["inclusion"]):
        steps = [bytes.fromhex(step) for step in path]
        assert second.from_path(leaves[index], index, size, steps).hex() == expected["roots"][str(size)]
    for old, path in golden["consistency"].items():
        assert [step.hex() for step in second.consistency(int(old), leaves)] == path


def test_the_vectors_are_reproducible(golden: Any) -> None:
    """The same people, clocks and salts give the same bytes: nothing in a statement is left to chance."""

    from tests.golden import make_claims

    again = make_claims.vectors()
    assert again["entries"] == golden["entries"] and again["cosignatures"] == golden["cosignatures"]


def test_the_second_reader_is_short() -> None:
    assert len(Path(second.__file__).read_text("utf-8").splitlines()) < 200
