"""The council: one member's round, and the tally, which is a pure function of the ledger.

Each member fetches, verifies and votes for itself. A vote compares `status` and the digests, never k: sums
differ in their last places from one machine to another.
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
from mtlsign.claims.ledger.view import Entry, LedgerView, read_ledger
from mtlsign.claims.ledger.witness import Witness, WitnessRound
from mtlsign.claims.statements.parsing import sign_statement
from mtlsign.claims.statements.types import Claim, Membership, Vote
from mtlsign.errors import KeyMaterialError
from mtlsign.watermark.keys.identity import Identity


@dataclass(frozen=True, slots=True)
class CountedVote:
    """One vote on a claim and whether it counts; `why` says what is wrong with one that does not."""

    index: int
    member: bytes
    vote: Vote
    why: str | None

    @property
    def counts(self) -> bool:
        """Whether it is in the tally."""
        return self.why is None


@dataclass(frozen=True)
class Tally:
    """What the council said: `outcome` is a vote's status that reached the threshold, `open` or
    `undecided`.
    """

    outcome: str
    threshold: int
    members: int
    counts: dict[str, int]
    ballots: tuple[CountedVote, ...]


def tally_votes(view: LedgerView, entry: Entry, claim: Claim) -> Tally:
    """Count the votes on a claim, from the ledger alone.

    A vote counts when it lies under a head that counts, comes from a member in force when the claim was
    made, is that member's first, came within the membership's window, was made by its policy, and names the
    claim's bytes, suspect and key.
    """
    council, came = view.council(entry.index), view.time(entry.index)
    ballots: list[CountedVote] = []
    done: set[bytes] = set()
    for at, vote in view.all(Vote):
        if vote.claim.index != entry.index and vote.claim.leaf != entry.leaf:
            continue
        why = _problem(view, at, vote, entry, claim, council, came, done)
        if why is None:
            done.add(vote.signer)
        ballots.append(CountedVote(at.index, vote.signer, vote, why))
    counts = Counter(ballot.vote.status for ballot in ballots if ballot.counts)
    winner = next((status for status, n in counts.items() if n >= council.threshold), None)
    newest = view.heads[-1].time if view.heads else 0
    closed = came is not None and newest > came + council.window
    left = len(council.members) - sum(counts.values())
    stuck = closed or max(counts.values(), default=0) + left < council.threshold
    outcome = winner or ("undecided" if stuck else "open")
    return Tally(outcome, council.threshold, len(council.members), dict(counts), tuple(ballots))


def _problem(
    view: LedgerView,
    at: Entry,
    vote: Vote,
    entry: Entry,
    claim: Claim,
    council: Membership,
    came: int | None,
    done: set[bytes],
) -> str | None:
    when = view.time(at.index)
    if vote.claim != entry.ref or at.index <= entry.index:
        return "is about a changed claim"
    if vote.signer not in council.members:
        return "comes from no member of the council"
    if vote.suspect != claim.suspect or vote.key != _key(claim):
        return "is about another model or key"
    if vote.bits != council.bits:
        return f"was made at {vote.bits} bits, the council decides at {council.bits}"
    if when is None or came is None:
        return "is not yet under a head that counts"
    if when > came + council.window:
        return "came too late"
    if vote.signer in done:
        return "is this member's second"
    return None


def _key(claim: Claim) -> bytes:
    """The opened key, or zeros where the opening is worth nothing."""
    try:
        return claim.opening.key()
    except KeyMaterialError:
        return bytes(32)


@dataclass(frozen=True)
class MemberRound:
    """What one member's round did: (claim's entry, finding, vote's entry), and its witness's two steps."""

    votes: tuple[tuple[int, Finding, int], ...]
    before: WitnessRound
    after: WitnessRound


def run_member_round(
    identity: Identity,
    ledger: Ledger,
    archive: BlobStore,
    judge: ClaimVerifier,
    *,
    memory: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> MemberRound:
    """One round of one member: witness, judge every claim that still wants this member's vote, witness again.

    Raises:
        LedgerError: the ledger is not what this witness saw before; then nothing was signed.
    """
    witness = Witness(identity, ledger, memory, clock=clock)
    before = witness.step()
    view = read_ledger(ledger)
    votes = []
    for entry, claim in view.all(Claim):
        council = view.council(entry.index)
        mine = [v for _, v in view.all(Vote) if v.signer == identity.public_key and v.claim == entry.ref]
        if mine or identity.public_key not in council.members:
            continue
        finding = member_finding(view, entry, claim, archive, judge)
        vote = Vote(
            signer=identity.public_key,
            ledger=view.origin,
            time=int(clock()),
            claim=entry.ref,
            suspect=claim.suspect,
            key=_key(claim),
            status=finding.status,
            matches=finding.matches,
            n=finding.n,
            millibits=int(1000 * finding.evidence_bits),
            bits=council.bits,
            reason=finding.reason,
        )
        votes.append((entry.index, finding, ledger.append(sign_statement(vote, identity))))
    return MemberRound(tuple(votes), before, witness.step() if votes else before)


def member_finding(
    view: LedgerView, entry: Entry, claim: Claim, archive: BlobStore, judge: ClaimVerifier
) -> Finding:
    """One member's finding: the ledger's rules first, then Algorithm 1 at the council's policy."""
    wrong = inadmissibility_reasons(view, entry, claim)
    if wrong:
        return Finding("inadmissible", reason=wrong[0].code)
    return fetch_and_verify(judge, archive, claim, claim.suspect, view.council(entry.index).bits)
