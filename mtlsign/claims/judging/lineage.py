"""From verdicts and ledger to lineage: the claimant × model matrix, edges, and each claim's standing.

A pass says that weights descend from a model which the holder of a key changed: it names no culprit and no
"owner". Order, lineage and exhibits say the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.admissibility import InadmissibilityReason, find_claim, inadmissibility_reasons
from mtlsign.claims.judging.council import Tally, tally_votes
from mtlsign.claims.judging.judge import ClaimVerifier, Finding, fetch_and_verify
from mtlsign.claims.judging.standings import Standing, say
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Claim, Exhibit, Publish, Register

Matrix = dict[str, dict[str, Finding]]


@dataclass(frozen=True)
class LineageEdge:
    """What two claims say about each other's committed models.

    `kind`: descends (the ancestor's key is in the descendant's model, not conversely), earlier (both are in
    both), undecided, unrelated. `ancestor` and `descendant` are claim ids where the kind has a direction.
    """

    claims: tuple[str, str]
    kind: str
    reason: str
    ancestor: str | None = None
    descendant: str | None = None


@dataclass(frozen=True)
class DisputeResult:
    """What `jobs/dispute.py` prints; `matrix[claim id][model digest]` is that claim's key on that model."""

    matrix: Matrix
    edges: list[LineageEdge]
    standings: list[Standing]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "matrix": {c: {m: asdict(f) for m, f in row.items()} for c, row in self.matrix.items()},
            "edges": [asdict(edge) for edge in self.edges],
            "standings": [asdict(standing) for standing in self.standings],
            "statuses": {standing.claim: standing.standing for standing in self.standings},
        }


@dataclass(frozen=True)
class _ClaimCase:
    entry: Entry
    claim: Claim
    faults: tuple[InadmissibilityReason, ...]
    tally: Tally
    published: int | None
    bits: int

    @property
    def id(self) -> str:
        return self.entry.leaf.hex()


def resolve_dispute(
    view: LedgerView, ids: Sequence[str], archive: BlobStore, judge: ClaimVerifier, *, bits: int = 0
) -> DisputeResult:
    """Judge claims on their suspects and on one another's committed models, and say where each one stands.

    Args:
        view: the ledger.
        ids: claims, by id or number.
        archive: has the models.
        judge: decides on models.
        bits: the least evidence that we accept. The council's policy holds too, but a council may be the
            claimant's invention, and so may its policy.

    Raises:
        ClaimError: an id names no claim of this ledger.
    """
    cases = [_case(view, *find_claim(view, name), bits) for name in dict.fromkeys(ids)]
    models = dict.fromkeys(digest for case in cases for digest in (case.claim.model, case.claim.suspect))
    matrix = {case.id: {m.hex(): _cell(case, m, archive, judge) for m in models} for case in cases}
    edges = [_edge(a, b, matrix) for a, b in combinations(cases, 2)]
    standings = [_standing(view, case, matrix[case.id], edges, archive, judge) for case in cases]
    return DisputeResult(matrix, edges, standings)


def _case(view: LedgerView, entry: Entry, claim: Claim, bits: int) -> _ClaimCase:
    published, bits = view.time(claim.publish.index), max(bits, view.council(entry.index).bits)
    return _ClaimCase(
        entry,
        claim,
        inadmissibility_reasons(view, entry, claim),
        tally_votes(view, entry, claim),
        published,
        bits,
    )


def _cell(case: _ClaimCase, model: bytes, archive: BlobStore, judge: ClaimVerifier) -> Finding:
    if case.faults:
        return Finding("inadmissible", reason=case.faults[0].code)
    return fetch_and_verify(judge, archive, case.claim, model, case.bits)


def _edge(a: _ClaimCase, b: _ClaimCase, matrix: Matrix) -> LineageEdge:
    """X→Y when key X passes on Y's committed model and key Y fails on X's.

    Only what is in the weights makes an edge: a trained head can be made to fit a rival's model as well. And
    only a claim whose own committed model is seen to carry its key: else whoever withholds a model, or
    commits to junk, could blur a rival's standing.
    """
    pair = (a.id, b.id)
    if a.faults or b.faults:
        return LineageEdge(
            pair, "unrelated", "one of the claims is not admissible, so its model says nothing"
        )
    if not all(matrix[case.id][case.claim.model.hex()].passes for case in (a, b)):
        return LineageEdge(pair, "unrelated", "one claim's own committed model is not seen to carry its key")
    a_on_b, b_on_a = matrix[a.id][b.claim.model.hex()], matrix[b.id][a.claim.model.hex()]
    if "not_verifiable" in (a_on_b.status, b_on_a.status):
        return LineageEdge(pair, "undecided", "a committed model could not be verified")
    one_way = "the first key is in the second's committed model, not conversely"
    if a_on_b.accepted and not b_on_a.accepted:
        return LineageEdge(pair, "descends", one_way, a.id, b.id)
    if b_on_a.accepted and not a_on_b.accepted:
        return LineageEdge(pair, "descends", one_way, b.id, a.id)
    if not a_on_b.accepted:
        return LineageEdge(pair, "unrelated", "neither key is in the weights of the other's committed model")
    if a.claim.publish == b.claim.publish:
        return LineageEdge(pair, "unrelated", "both claims are of one publication")
    if a.published is None or b.published is None or a.published == b.published:
        return LineageEdge(
            pair, "undecided", "both keys are in both models, and no head tells which came first"
        )
    first, second = sorted((a, b), key=lambda case: case.claim.publish.index)
    return LineageEdge(
        pair, "earlier", "both keys are in both models; one was committed earlier", first.id, second.id
    )


def _standing(
    view: LedgerView,
    case: _ClaimCase,
    row: dict[str, Finding],
    edges: Sequence[LineageEdge],
    archive: BlobStore,
    judge: ClaimVerifier,
) -> Standing:
    on_suspect, on_own = row[case.claim.suspect.hex()], row[case.claim.model.hex()]
    numbers: dict[str, Any] = {
        "matches": on_suspect.matches,
        "n": on_suspect.n,
        "evidence_bits": on_suspect.evidence_bits,
        "bits_required": case.bits,
        "publication": case.claim.publish.index,
        "registered": case.claim.register.index,
        "entry": case.entry.index,
        "published": case.published,
        "claimed": view.time(case.entry.index),
        "votes": case.tally.counts,
        "council": case.tally.outcome,
    }
    reason, more = _reason(view, case, on_suspect, on_own, edges, archive, judge)
    return say(case.id, reason, numbers, **more)


def _reason(
    view: LedgerView,
    case: _ClaimCase,
    on_suspect: Finding,
    on_own: Finding,
    edges: Sequence[LineageEdge],
    archive: BlobStore,
    judge: ClaimVerifier,
) -> tuple[str, dict[str, object]]:
    """The first reason that applies, from what bars a claim to what supports it."""
    if case.faults:
        return case.faults[0].code, {}
    if on_suspect.status == "inadmissible":
        return "evidence_missing", {"why": on_suspect.reason}
    if on_suspect.status == "not_verifiable":
        return "suspect_not_verifiable", {"why": on_suspect.reason or "it cannot be read"}
    if not on_suspect.passes:
        return "not_in_the_weights", {}
    if on_own.status == "not_verifiable":
        return "committed_model_not_verifiable", {"why": on_own.reason or "it cannot be read"}
    if not on_own.passes:
        return "committed_model_unmarked", {}
    if case.published is None:
        return "publication_not_counted", {}
    if not on_suspect.accepted:
        return "free_head", {}
    shown = _exhibit(view, case, archive, judge)
    if shown is not None:
        return shown
    for edge in edges:
        if edge.descendant == case.id and edge.ancestor is not None:
            above = {"descends": "built_on_a_marked_model", "earlier": "earlier_commitment"}[edge.kind]
            return above, {"other": edge.ancestor[:16]}
    if any(edge.kind == "undecided" and case.id in edge.claims for edge in edges):
        return "no_order", {}
    if case.tally.outcome not in ("open", "accepted"):
        return "council_disagrees", {}
    if view.self_attested(case.claim.publish.index, case.claim.signer):
        return "nobody_else_cosigned", {}
    return "accepted", {}


def _exhibit(
    view: LedgerView, case: _ClaimCase, archive: BlobStore, judge: ClaimVerifier
) -> tuple[str, dict[str, object]] | None:
    """What exhibits show: the earliest-stamped model of the accused side on which this claim's key passes.

    The claim's own committed model, and what the claimant herself stamped (an earlier suspect), show nothing.
    """
    found = []
    for entry, shown in view.all(Exhibit):
        stamp = shown.stamp.index
        if (
            shown.claim != case.entry.ref
            or view.time(entry.index) is None
            or not _is_timestamped(view, shown)
        ):
            continue
        stamped_by = view.entries[stamp].statement
        if shown.model == case.claim.model or stamped_by is None or stamped_by.signer == case.claim.signer:
            continue
        if (
            stamp < case.claim.register.index
            and fetch_and_verify(judge, archive, case.claim, shown.model, case.bits).accepted
        ):
            found.append(stamp)
    if not found:
        return None
    before = min(found) < case.claim.publish.index
    return ("exhibit_before_publication" if before else "exhibit_before_registration"), {"stamp": min(found)}


def _is_timestamped(view: LedgerView, shown: Exhibit) -> bool:
    if shown.salt is None:
        seen = view.at(shown.stamp, Register)
        return seen is not None and shown.model in [digest for _, digest in seen.models]
    published = view.at(shown.stamp, Publish)
    if published is None or published.signer != shown.signer:
        return False
    return commitments.commit_model(shown.salt, shown.signer, shown.model) == published.model
