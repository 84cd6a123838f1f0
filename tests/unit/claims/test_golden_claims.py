"""Golden ledger: read by the package, and by a second implementation written from `docs/claims.md`."""

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
from tests.conformance import reference_claim_verifier as reference

PATH = Path(__file__).parent.parent.parent / "golden" / "v1" / "claims.json"


@pytest.fixture(scope="module")
def golden() -> Any:
    vectors = json.loads(PATH.read_text("utf-8"))
    vectors["rows"] = [base64.b64decode(row) for row in vectors["entries"]]
    return vectors


@pytest.fixture(scope="module")
def view(golden: Any) -> LedgerView:
    origin = merkle.leaf_hash(golden["rows"][0])
    signed = [
        (Checkpoint(origin, item["size"], bytes.fromhex(item["root"])), parse_line(item["line"]))
        for item in golden["cosignatures"]
    ]
    return LedgerView.from_entries(golden["rows"], signed)


def test_package_reads_golden_ledger_as_recorded(golden: Any, view: LedgerView) -> None:
    expected, size = golden["expected"], len(golden["rows"])
    assert view.origin.hex() == expected["origin"] and not view.warnings
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
    for row in golden["rows"]:  # a parsed statement is serialized to the same bytes
        payload = open_envelope(row).payload
        assert parse(payload).payload() == payload
    checkpoint, lines = checkpoints.parse_signed_note(golden["head"].encode())
    council = view.council(checkpoint.size)
    assert len(checkpoints.cosigner_times(checkpoint, lines, council.members)) >= council.threshold
    assert checkpoints.encode_signed_note(checkpoint, lines).decode() == golden["head"]


def test_reference_reader_agrees_on_golden_ledger(golden: Any, view: LedgerView) -> None:
    rows, expected = golden["rows"], golden["expected"]
    state = reference.read(rows, golden["cosignatures"])
    assert {name: state[name] for name in ("origin", "kinds", "times", "leaves")} == {
        name: expected[name] for name in ("origin", "kinds", "times", "leaves")
    }
    for index, counts in expected["tallies"].items():
        claim = state["statements"][int(index)]
        publication = state["statements"][claim["predicate"]["publish"]["index"]]
        assert reference.is_committed(claim, publication) and reference.votes(state, int(index)) == counts
        other = json.loads(json.dumps(claim))
        other["predicate"]["model"]["salt"] = "00" * 32
        assert not reference.is_committed(other, publication)
    assert (
        reference.key_of(state["statements"][next(iter(view.all(Claim)))[0].index]).hex() == expected["key"]
    )


def test_golden_proofs_match_rfc_6962(golden: Any) -> None:
    rows, expected = golden["rows"], golden["expected"]
    leaves, size = [reference.leaf(row) for row in rows], len(golden["rows"])
    for count, root in expected["roots"].items():
        assert reference.root(leaves[: int(count)]).hex() == root
    for index, path in enumerate(golden["inclusion"]):
        steps = [bytes.fromhex(step) for step in path]
        assert reference.from_path(leaves[index], index, size, steps).hex() == expected["roots"][str(size)]
    for old, path in golden["consistency"].items():
        assert [step.hex() for step in reference.consistency(int(old), leaves)] == path


def test_golden_vectors_are_reproducible(golden: Any) -> None:
    """Equal identities, clocks and salts give equal bytes: statements contain no other randomness."""
    from tests.golden import make_claims

    vectors = make_claims.vectors()
    assert make_claims.serialize(vectors) == PATH.read_text("utf-8")
    assert vectors["entries"] == golden["entries"] and vectors["cosignatures"] == golden["cosignatures"]


def test_reference_reader_has_under_200_lines() -> None:
    assert len(Path(reference.__file__).read_text("utf-8").splitlines()) < 200
