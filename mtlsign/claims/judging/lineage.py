"""Lineage of disputed claims: findings of every key on every model, edges between claims, and standings.

An accepted finding shows that weights descend from a model which the holder of a key changed. It identifies
neither a culprit nor a legal owner. Order, lineage and exhibits supply the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.admissibility import (
    InadmissibilityReason,
    find_claim,
    first_registration,
    inadmissibility_reasons,
)
from mtlsign.claims.judging.council import Tally, tally_votes
from mtlsign.claims.judging.judge import ClaimVerifier, Finding, fetch_and_verify
from mtlsign.claims.judging.standings import Standing, make_standing
from mtlsign.claims.ledger.view import Entry, LedgerView
from mtlsign.claims.statements import commitments
from mtlsign.claims.statements.types import Claim, Exhibit, Publish, Register

Matrix = dict[str, dict[str, Finding]]


@dataclass(frozen=True)
class LineageEdge:
    """Relation between the committed models of two claims.

    Attributes:
        claims: ids of both claims.
        kind: `descends` (the ancestor's key is in the descendant's model, but not conversely), `earlier`
            (both keys are in both models), `undecided` or `unrelated`.
        reason: one clause for display.
        ancestor: claim id, for kinds with a direction.
        descendant: claim id, for kinds with a direction.
    """

    claims: tuple[str, str]
    kind: str
    reason: str
    ancestor: str | None = None
    descendant: str | None = None


@dataclass(frozen=True)
class DisputeResult:
    """Result of a dispute. `matrix[claim id][model digest]` is the finding of a claim's key on a model."""

    matrix: Matrix
    edges: list[LineageEdge]
    standings: list[Standing]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "matrix": {c: {m: asdict(f) for m, f in row.items()} for c, row in self.matrix.items()},
            "edges": [asdict(edge) for edge in self.edges],
            "standings": [asdict(standing) for standing in self.standings],
            "statuses": {standing.claim: standing.standing for standing in self.standings},
        }


@dataclass(frozen=True)
class _ClaimCase:
    """Claim with its admissibility, tally, time of publication and required evidence in bits."""

    entry: Entry
    claim: Claim
    inadmissible: tuple[InadmissibilityReason, ...]
    tally: Tally
    published: int | None
    bits: int

    @property
    def id(self) -> str:
        return self.entry.leaf.hex()


@dataclass(frozen=True)
class _Evidence:
    """Sources from which standings are derived."""

    view: LedgerView
    archive: BlobStore
    judge: ClaimVerifier
    pinned: bool

    def finding(self, case: _ClaimCase, model: bytes) -> Finding:
        """Return the finding of a claim's key on the model with the digest `model`."""
        return fetch_and_verify(self.judge, self.archive, case.claim, model, case.bits)


def resolve_dispute(
    view: LedgerView, ids: Sequence[str], archive: BlobStore, judge: ClaimVerifier, *, bits: int = 0,
    pinned: bool = True,
) -> DisputeResult:  # fmt: skip
    """Verify claims on their suspects and on one another's committed models, and derive their standings.

    Args:
        view: the ledger.
        ids: ids or indices of the claims.
        archive: contains models and references by digest.
        judge: verifies keys on models.
        bits: minimum evidence that the caller accepts. The council's policy applies as well, but a claimant
            may have invented the council together with its policy.
        pinned: whether the caller knows the ledger from another source than the claimant. Otherwise a
            claim is at most `self_attested`.

    Raises:
        ClaimError: an id does not belong to a claim of this ledger.
    """
    evidence = _Evidence(view, archive, judge, pinned)
    cases = [_case(view, *find_claim(view, name), bits) for name in dict.fromkeys(ids)]
    models = dict.fromkeys(digest for case in cases for digest in (case.claim.model, case.claim.suspect))
    matrix = {case.id: {model.hex(): _cell(case, model, evidence) for model in models} for case in cases}
    edges = [_edge(a, b, matrix) for a, b in combinations(cases, 2)]
    standings = [_standing(case, matrix[case.id], edges, evidence) for case in cases]
    return DisputeResult(matrix, edges, standings)


def _case(view: LedgerView, entry: Entry, claim: Claim, bits: int) -> _ClaimCase:
    published, required_bits = view.time(claim.publish.index), max(bits, view.council(entry.index).bits)
    reasons = inadmissibility_reasons(view, entry, claim)
    return _ClaimCase(entry, claim, reasons, tally_votes(view, entry, claim), published, required_bits)


def _cell(case: _ClaimCase, model: bytes, evidence: _Evidence) -> Finding:
    if case.inadmissible:
        return Finding("inadmissible", reason=case.inadmissible[0].code)
    return evidence.finding(case, model)


def _edge(a: _ClaimCase, b: _ClaimCase, matrix: Matrix) -> LineageEdge:
    """Return the edge X→Y when key X is accepted on Y's committed model and key Y is not on X's.

    Only an accepted key makes an edge, because a trained head can be made to match a rival's model as well.
    Each committed model must carry its own key; otherwise a claimant who withholds the model, or commits to
    an unmarked one, could weaken a rival's standing.
    """
    pair = (a.id, b.id)
    if a.inadmissible or b.inadmissible:
        return LineageEdge(pair, "unrelated", "one of the claims is inadmissible, so its model has no weight")
    if not all(matrix[case.id][case.claim.model.hex()].passes for case in (a, b)):
        return LineageEdge(pair, "unrelated", "one committed model does not verifiably carry its own key")
    a_on_b, b_on_a = matrix[a.id][b.claim.model.hex()], matrix[b.id][a.claim.model.hex()]
    if "not_verifiable" in (a_on_b.status, b_on_a.status):
        return LineageEdge(pair, "undecided", "a committed model could not be verified")
    one_way = "the first key is in the second's committed model, and the converse was not shown"
    if a_on_b.accepted and not b_on_a.accepted:
        return LineageEdge(pair, "descends", one_way, a.id, b.id)
    if b_on_a.accepted and not a_on_b.accepted:
        return LineageEdge(pair, "descends", one_way, b.id, a.id)
    if not a_on_b.accepted:
        return LineageEdge(pair, "unrelated", "neither key was shown to be in the other's committed model")
    if a.claim.publish == b.claim.publish:
        return LineageEdge(pair, "unrelated", "both claims belong to one publication")
    if a.published is None or b.published is None or a.published == b.published:
        reason = "both keys are in both models, and no checkpoint shows which was committed first"
        return LineageEdge(pair, "undecided", reason)
    first, second = sorted((a, b), key=lambda case: case.claim.publish.index)
    reason = "both keys are in both models, and one was committed earlier"
    return LineageEdge(pair, "earlier", reason, first.id, second.id)


def _standing(
    case: _ClaimCase, row: dict[str, Finding], edges: Sequence[LineageEdge], evidence: _Evidence
) -> Standing:
    on_suspect, on_own = row[case.claim.suspect.hex()], row[case.claim.model.hex()]
    numbers: dict[str, Any] = {
        "matches": on_suspect.matches,
        "n": on_suspect.n,
        "evidence_bits": on_suspect.evidence_bits,
        "bits_required": case.bits,
        "publication": case.claim.publish.index,
        "registered": case.claim.register.index,
        "suspect_registered": first_registration(evidence.view, case.claim.suspect),
        "entry": case.entry.index,
        "published": case.published,
        "claimed": evidence.view.time(case.entry.index),
        "votes": case.tally.counts,
        "council": case.tally.outcome,
    }
    reason, details = _finding_reason(case, on_suspect, on_own, evidence.view) or _order_reason(
        case, edges, evidence
    )
    return make_standing(case.id, reason, numbers, **details)


def _finding_reason(
    case: _ClaimCase, on_suspect: Finding, on_own: Finding, view: LedgerView
) -> tuple[str, dict[str, object]] | None:
    """Return the first reason in the claim itself and its findings, or None if they support it."""
    if case.inadmissible:
        return case.inadmissible[0].code, {}
    if on_suspect.status == "inadmissible":
        return "evidence_missing", {"why": on_suspect.reason.rstrip(".")}
    if on_suspect.status == "not_verifiable":
        return "suspect_not_verifiable", {"why": on_suspect.reason.rstrip(".") or "it cannot be read"}
    if not on_suspect.passes:
        return "not_in_the_weights", {}
    if on_own.status == "not_verifiable":
        return "committed_model_not_verifiable", {"why": on_own.reason.rstrip(".") or "it cannot be read"}
    if not on_own.passes:
        return "committed_model_unmarked", {}
    if case.published is None:
        return "publication_not_counted", {}
    if on_suspect.accepted:
        return None
    return ("free_head" if _was_committed_first(case, view) else "registered_before_publication"), {}


def _was_committed_first(case: _ClaimCase, view: LedgerView) -> bool:
    """Return whether the publication precedes every registration of the accused model."""
    registration = first_registration(view, case.claim.suspect)
    return registration is None or case.claim.publish.index < registration


def _order_reason(
    case: _ClaimCase, edges: Sequence[LineageEdge], evidence: _Evidence
) -> tuple[str, dict[str, object]]:
    """Return the first reason in exhibits, lineage, votes and co-signatures, or `accepted`."""
    exhibit = _exhibit_reason(case, evidence)
    if exhibit is not None:
        return exhibit
    for edge in edges:
        if edge.descendant == case.id and edge.ancestor is not None:
            reason = {"descends": "built_on_a_marked_model", "earlier": "earlier_commitment"}[edge.kind]
            return reason, {"other": edge.ancestor[:16]}
    if any(edge.kind == "undecided" and case.id in edge.claims for edge in edges):
        return "no_order", {}
    if not _was_committed_first(case, evidence.view):
        return "registered_before_publication", {}
    if case.tally.outcome not in ("open", "accepted"):
        return "council_disagrees", {}
    if not evidence.pinned:
        return "checkpoint_not_pinned", {}
    if evidence.view.self_attested(case.claim.publish.index, case.claim.signer):
        return "no_other_cosigner", {}
    return "accepted", {}


def _exhibit_reason(case: _ClaimCase, evidence: _Evidence) -> tuple[str, dict[str, object]] | None:
    """Return the reason of the earliest timestamped exhibit on which this claim's key is accepted, or None.

    Neither the claim's committed model nor a model that the claimant timestamped (an earlier suspect) can
    serve as an exhibit.
    """
    view, claim = evidence.view, case.claim
    stamps = []
    for entry, exhibit in view.all(Exhibit):
        is_confirmed = exhibit.claim == case.entry.ref and view.time(entry.index) is not None
        if not is_confirmed or not _is_timestamped(view, exhibit):
            continue
        stamp = exhibit.stamp.index
        author = getattr(view.entries[stamp].statement, "signer", claim.signer)
        if exhibit.model == claim.model or author == claim.signer:
            continue
        if stamp < claim.register.index and evidence.finding(case, exhibit.model).accepted:
            stamps.append(stamp)
    if not stamps:
        return None
    earliest = min(stamps)
    is_before_publication = earliest < claim.publish.index
    reason = "exhibit_before_publication" if is_before_publication else "exhibit_before_registration"
    return reason, {"stamp": earliest}


def _is_timestamped(view: LedgerView, exhibit: Exhibit) -> bool:
    """Return whether the entry `stamp` of an exhibit timestamps its model for the exhibit's author."""
    if exhibit.salt is None:
        registration = view.at(exhibit.stamp, Register)
        return registration is not None and exhibit.model in [digest for _, digest in registration.models]
    publication = view.at(exhibit.stamp, Publish)
    if publication is None or publication.signer != exhibit.signer:
        return False
    return commitments.commit_model(exhibit.salt, exhibit.signer, exhibit.model) == publication.model
