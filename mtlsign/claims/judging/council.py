"""Council: one member's round, and the tally of votes, which is a pure function of the ledger.

Each member fetches, verifies and votes independently. Votes are compared by `status` and digests and never by
the count k, because sums differ in their last digits between machines.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtlsign.claims.blob_store import BlobStore
from mtlsign.claims.judging.admissibility import inadmissibility_reasons
from mtlsign.claims.judging.judge import ClaimVerifier, Finding, fetch_and_verify
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.view import Entry, IncrementalReader, LedgerView
from mtlsign.claims.ledger.witness import Witness, WitnessRound
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Membership, Vote
from mtlsign.errors import ClaimError, KeyMaterialError, StorageError
from mtlsign.watermark.keys.identity import Identity


@dataclass(frozen=True, slots=True)
class CountedVote:
    """Vote on a claim. `problem` is the reason why it does not count, or None."""

    index: int
    member: bytes
    vote: Vote
    problem: str | None

    @property
    def counts(self) -> bool:
        """Return whether the vote is in the tally."""
        return self.problem is None


@dataclass(frozen=True)
class Tally:
    """Outcome of the votes on a claim.

    Attributes:
        outcome: the status that reached the threshold, `open`, or `undecided`.
        threshold: number of equal votes required.
        members: number of council members.
        counts: status → number of counted votes.
        votes: all votes, also those that do not count.
    """

    outcome: str
    threshold: int
    members: int
    counts: dict[str, int]
    votes: tuple[CountedVote, ...]


def tally_votes(view: LedgerView, entry: Entry, claim: Claim) -> Tally:
    """Count the votes on a claim from the ledger alone.

    A vote counts if it is under a confirmed checkpoint, comes from a member in force when the claim was made,
    is that member's first, was made within the membership's window and with its policy, and refers to the
    claim's exact bytes, suspect and key.

    Args:
        view: the ledger.
        entry: entry of the claim.
        claim: its statement.
    """
    council, claim_time = view.council(entry.index), view.time(entry.index)
    votes: list[CountedVote] = []
    voters: set[bytes] = set()
    for vote_entry, vote in view.all(Vote):
        if vote.claim.index != entry.index and vote.claim.leaf != entry.leaf:
            continue
        problem = _content_problem(vote_entry, vote, entry, claim, council)
        problem = problem or _time_problem(view.time(vote_entry.index), claim_time, council)
        if problem is None and vote.signer in voters:
            problem = "The member voted before."
        if problem is None:
            voters.add(vote.signer)
        votes.append(CountedVote(vote_entry.index, vote.signer, vote, problem))
    counts = Counter(vote.vote.status for vote in votes if vote.counts)
    winner = next((status for status, n in counts.items() if n >= council.threshold), None)
    newest_time = view.confirmed[-1].time if view.confirmed else 0
    is_over = claim_time is not None and newest_time > claim_time + council.window
    outstanding = len(council.members) - sum(counts.values())
    is_undecided = is_over or max(counts.values(), default=0) + outstanding < council.threshold
    outcome = winner or ("undecided" if is_undecided else "open")
    return Tally(outcome, council.threshold, len(council.members), dict(counts), tuple(votes))


def _content_problem(
    vote_entry: Entry, vote: Vote, entry: Entry, claim: Claim, council: Membership
) -> str | None:
    if vote.claim != entry.ref or vote_entry.index <= entry.index:
        return "The vote refers to another version of the claim."
    if vote.signer not in council.members:
        return "The voter is not a member of the council."
    if vote.suspect != claim.suspect or vote.key != _opened_key(claim):
        return "The vote refers to another model or key."
    if vote.bits != council.bits:
        return f"The vote was made at {vote.bits} bits; the council decides at {council.bits}."
    return None


def _time_problem(vote_time: int | None, claim_time: int | None, council: Membership) -> str | None:
    if vote_time is None or claim_time is None:
        return "The vote is not under a confirmed checkpoint yet."
    if vote_time > claim_time + council.window:
        return "The vote was made after the end of the voting window."
    return None


def _opened_key(claim: Claim) -> bytes:
    """Return the opened key, or zeros if the opening is invalid."""
    try:
        return claim.opening.key()
    except KeyMaterialError:
        return bytes(32)


@dataclass(frozen=True)
class MemberRound:
    """Result of one member's round: its votes, and the witness rounds before and after them.

    Attributes:
        votes: (index of the claim, finding, index of the vote) triples.
        before: witness round at the start.
        after: witness round at the end; the same as `before` if there were no votes.
        postponed: (index of the claim, problem) pairs of claims whose files could not be fetched, or whose
            verification could not be started; a later round tries them once more.
    """

    votes: tuple[tuple[int, Finding, int], ...]
    before: WitnessRound
    after: WitnessRound
    postponed: tuple[tuple[int, str], ...] = ()


def run_member_round(
    identity: Identity,
    ledger: Ledger,
    archive: BlobStore,
    judge: ClaimVerifier,
    *,
    witness_state: Path | None = None,
    clock: Callable[[], float] = time.time,
    reader: IncrementalReader | None = None,
) -> MemberRound:
    """Run one round of a member: co-sign, vote on every claim without this member's vote, co-sign once more.

    Args:
        identity: the member.
        ledger: the ledger.
        archive: contains models and references by digest.
        judge: verifies keys on models.
        witness_state: file of the witness; default: next to the default identity.
        clock: returns POSIX seconds.
        reader: reader of the ledger, which verifies only entries that are new to it; default: a new one.

    Raises:
        LedgerError: the ledger does not extend the tree that this witness co-signed; nothing was signed.
    """
    reader = reader or IncrementalReader(ledger)
    witness = Witness(identity, ledger, witness_state, clock=clock, reader=reader)
    before = witness.run_once()
    view = reader.view()
    votes, postponed = [], []
    for entry, claim in view.all(Claim):
        council = view.council(entry.index)
        has_voted = any(
            vote.signer == identity.public_key and vote.claim == entry.ref for _, vote in view.all(Vote)
        )
        if has_voted or identity.public_key not in council.members:
            continue
        try:
            finding = member_finding(view, entry, claim, archive, judge)
        except (StorageError, ClaimError) as error:
            postponed.append((entry.index, str(error)))
            continue
        vote = Vote(
            signer=identity.public_key,
            ledger=view.origin,
            time=int(clock()),
            claim=entry.ref,
            suspect=claim.suspect,
            key=_opened_key(claim),
            status=finding.status,
            matches=finding.matches,
            n=finding.n,
            millibits=int(1000 * finding.evidence_bits),
            bits=council.bits,
            reason=finding.reason,
        )
        votes.append((entry.index, finding, ledger.append(sign_statement(vote, identity))))
    after = witness.run_once() if votes else before
    return MemberRound(tuple(votes), before, after, tuple(postponed))


def member_finding(
    view: LedgerView, entry: Entry, claim: Claim, archive: BlobStore, judge: ClaimVerifier
) -> Finding:
    """Return one member's finding: admissibility first, then Algorithm 1 with the council's policy.

    Args:
        view: the ledger.
        entry: entry of the claim.
        claim: its statement.
        archive: contains models and references by digest.
        judge: verifies keys on models.
    """
    reasons = inadmissibility_reasons(view, entry, claim)
    if reasons:
        return Finding("inadmissible", reason=reasons[0].code)
    return fetch_and_verify(judge, archive, claim, claim.suspect, view.council(entry.index).bits)
