"""Verified view of a ledger: valid statements, councils, confirmed checkpoints and the time of each entry.

`LedgerView.from_entries` is a pure function of bytes: the same entries and co-signatures give the same view
to every reader. Malformed entries, statements of another ledger and repeated entries remain visible with
their problem; they have no effect.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature, earliest_valid_line, median
from mtlsign.claims.ledger.rebuild import TreeRebuilder
from mtlsign.claims.statements.parsing import open_statement
from mtlsign.claims.statements.types import Membership, Ref, Statement
from mtlsign.errors import ClaimError, LedgerError

S = TypeVar("S", bound=Statement)


@dataclass(frozen=True, slots=True)
class Entry:
    """Ledger entry. `statement` is None if the entry has no effect; `problem` then gives the reason."""

    index: int
    leaf: bytes
    statement: Statement | None
    signers: tuple[bytes, ...] = ()
    problem: str | None = None

    @property
    def ref(self) -> Ref:
        """Reference by which other statements name this entry."""
        return Ref(self.index, self.leaf)


@dataclass(frozen=True, slots=True)
class ConfirmedCheckpoint:
    """Checkpoint with the co-signatures of at least the council's threshold of members.

    Attributes:
        checkpoint: the co-signed tree.
        times: public key of each co-signing member → time by that member's clock.
        time: median of `times`, but never earlier than the time of an earlier confirmed checkpoint.
    """

    checkpoint: Checkpoint
    times: Mapping[bytes, int]
    time: int


@dataclass(frozen=True)
class LedgerView:
    """Verified view of a ledger.

    Attributes:
        origin: leaf hash of entry 0.
        entries: entries by index; a bundle's view has only some of them.
        councils: (index, membership) pairs; each is in force for the entries after it.
        confirmed: confirmed checkpoints by ascending size.
        warnings: sentences for display.
    """

    origin: bytes
    entries: Mapping[int, Entry]
    councils: tuple[tuple[int, Membership], ...]
    confirmed: tuple[ConfirmedCheckpoint, ...]
    warnings: tuple[str, ...] = ()
    _sizes: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def from_entries(
        cls, envelopes: Iterable[bytes], cosignatures: Sequence[tuple[Checkpoint, Cosignature]]
    ) -> LedgerView:
        """Build the view from all entries of a ledger in order, and the co-signatures stored with them.

        Raises:
            LedgerError: entry 0 does not create a ledger; or enough members co-signed a tree that these
                entries do not form: the ledger was truncated, forked or rewritten.
        """
        sizes = {checkpoint.size for checkpoint, _ in cosignatures}
        tree, roots, rows = merkle.CompactRange(), {0: merkle.EMPTY_ROOT}, {}
        for index, envelope in enumerate(envelopes):
            rows[index] = envelope
            tree.append(merkle.leaf_hash(envelope))
            if tree.size in sizes:
                roots[tree.size] = tree.root()
        return cls.assemble(rows, cosignatures, roots)

    @classmethod
    def assemble(
        cls,
        rows: Mapping[int, bytes],
        cosignatures: Sequence[tuple[Checkpoint, Cosignature]],
        roots: Mapping[int, bytes],
    ) -> LedgerView:
        """Build the view from some entries, entry 0 among them.

        Args:
            rows: envelopes by index.
            cosignatures: stored co-signatures, unverified.
            roots: verified root of each co-signed size.

        Raises:
            LedgerError: as `from_entries`.
        """
        entries, councils = _read_entries(rows)
        origin = entries[0].leaf
        lines_by_tree: dict[tuple[int, bytes], list[Cosignature]] = {}
        for checkpoint, line in cosignatures:
            if checkpoint.origin == origin:
                lines_by_tree.setdefault((checkpoint.size, checkpoint.root), []).append(line)
        confirmed: list[ConfirmedCheckpoint] = []
        warnings: list[str] = []
        latest_time = 0
        for (size, root), lines in sorted(lines_by_tree.items()):
            council, checkpoint = _in_force(councils, size), Checkpoint(origin, size, root)
            times = _valid_times(checkpoint, lines, council)
            if not times:
                continue
            has_threshold = len(times) >= council.threshold
            if roots.get(size) != root:
                sentence = _other_tree_sentence(size, times, is_truncated=size not in roots)
                if has_threshold:
                    raise LedgerError(f"{sentence} Do not use this ledger; ask its members.", field="ledger")
                warnings.append(sentence)
            elif has_threshold:
                latest_time = max(latest_time, median(times.values()))
                confirmed.append(ConfirmedCheckpoint(checkpoint, times, latest_time))
        sizes = [item.checkpoint.size for item in confirmed]
        return cls(origin, entries, tuple(councils), tuple(confirmed), tuple(warnings), sizes)

    def first_confirmed(self, index: int) -> ConfirmedCheckpoint | None:
        """Return the first confirmed checkpoint that contains entry `index`, or None."""
        position = bisect.bisect_right(self._sizes, index)
        return self.confirmed[position] if position < len(self.confirmed) else None

    def time(self, index: int) -> int | None:
        """Return the time of entry `index` in POSIX seconds, or None while no checkpoint confirms it.

        It is the median of the co-signers' times of the first confirmed checkpoint that contains the entry.
        """
        first = self.first_confirmed(index)
        return None if first is None else first.time

    def council(self, index: int) -> Membership:
        """Return the membership in force for entry `index`."""
        return _in_force(self.councils, index)

    def all(self, kind: type[S]) -> Iterator[tuple[Entry, S]]:
        """Yield all statements of one kind with their entries, in order."""
        for entry in self.entries.values():
            if isinstance(entry.statement, kind):
                yield entry, entry.statement

    def at(self, ref: Ref, kind: type[S]) -> S | None:
        """Return the statement at `ref` if index and leaf hash match and it has this kind, else None."""
        entry = self.entries.get(ref.index)
        if entry is None or entry.leaf != ref.leaf or not isinstance(entry.statement, kind):
            return None
        return entry.statement

    def self_attested(self, index: int, owner: bytes) -> bool:
        """Return whether `owner` alone co-signed the first confirmed checkpoint of entry `index`."""
        first = self.first_confirmed(index)
        return first is None or set(first.times) <= {owner}


def read_ledger(ledger: Ledger) -> LedgerView:
    """Return the current view of a whole ledger. Raises LedgerError as `IncrementalReader.view` does."""
    return IncrementalReader(ledger).view()


class IncrementalReader:
    """Reader that fetches only new entries on each call. Owners use it; a witness reads all entries."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._rows: list[bytes] = []
        self._tree = merkle.CompactRange()

    def view(self) -> LedgerView:
        """Return the current view, its tree recomputed from the entries.

        Raises:
            LedgerError: entries read before are missing, a stored node does not match the entries, or the
                view cannot be built (`LedgerView.from_entries`).
        """
        # Co-signatures are read first; otherwise one could be newer than the entries.
        cosignatures = self.ledger.cosignatures(self.ledger.origin())
        state, consistency = self.ledger.tree_state(), self.ledger.staleness()
        if state.size < self._tree.size:
            message = "The ledger has fewer entries than before. Do not use it; ask its members."
            raise LedgerError(message if consistency.current else consistency.note, field="ledger")
        rows, rebuilder = list(self._rows), TreeRebuilder(self.ledger, self._tree)
        for envelope in self.ledger.scan(self._tree.size, state.size):
            rows.append(envelope)
            rebuilder.add(envelope)
        rebuilder.finish(state)
        view = LedgerView.from_entries(rows, cosignatures)
        self._rows, self._tree = rows, rebuilder.tree  # last, so that a failed read is repeated in full
        return view


@lru_cache(maxsize=16_384)
def _open_cached(data: bytes) -> tuple[Statement, tuple[bytes, ...]]:
    """Return `open_statement(data)`. Entries never change, and each one costs a signature check."""
    return open_statement(data)


def _valid_times(
    checkpoint: Checkpoint, lines: Sequence[Cosignature], council: Membership
) -> dict[bytes, int]:
    """Return each member's earliest valid time; unlike `cosigner_times`, an invalid line is only ignored.

    Any sender can store lines, so an invalid line must not invalidate the members' valid ones.
    """
    earliest = {member: earliest_valid_line(checkpoint, lines, member) for member in council.members}
    return {member: line.time for member, line in earliest.items() if line is not None}


def _other_tree_sentence(size: int, times: Mapping[bytes, int], *, is_truncated: bool) -> str:
    cosigners = ", ".join(member.hex()[:16] for member in sorted(times))
    state = "is truncated" if is_truncated else "differs from the co-signed tree"
    return f"The ledger {state}: {cosigners} co-signed another tree of {size} entries."


def _in_force(councils: Sequence[tuple[int, Membership]], index: int) -> Membership:
    position = bisect.bisect_left([i for i, _ in councils], index)
    return councils[max(position - 1, 0)][1]


def _read_entries(rows: Mapping[int, bytes]) -> tuple[dict[int, Entry], list[tuple[int, Membership]]]:
    entries: dict[int, Entry] = {}
    councils: list[tuple[int, Membership]] = []
    first_index: dict[bytes, int] = {}
    current: tuple[Ref, Membership] | None = None
    for index in sorted(rows):
        leaf = merkle.leaf_hash(rows[index])
        entry = _entry(index, leaf, rows[index], entries[0].leaf if entries else None)
        if leaf in first_index:
            entry = Entry(index, leaf, None, problem=f"The entry repeats entry {first_index[leaf]}.")
        first_index.setdefault(leaf, index)
        statement = entry.statement
        if isinstance(statement, Membership):
            problem = _membership_problem(statement, entry.signers, current)
            if problem is None:
                councils.append((index, statement))
                current = (entry.ref, statement)
            else:
                entry = Entry(index, leaf, None, problem=problem)
        if not entries and (index != 0 or not councils):
            raise LedgerError(
                "Entry 0 is not the membership that creates a ledger. Open another ledger.", field="ledger"
            )
        entries[index] = entry
    if not entries:
        raise LedgerError("The ledger is empty. Create it first with jobs/ledger.py create.", field="ledger")
    return entries, councils


def _entry(index: int, leaf: bytes, data: bytes, origin: bytes | None) -> Entry:
    try:
        statement, signers = _open_cached(data)
    except ClaimError as error:
        return Entry(index, leaf, None, problem=str(error))
    if statement.ledger != origin:
        return Entry(index, leaf, None, problem="The statement was made for another ledger.")
    return Entry(index, leaf, statement, signers)


def _membership_problem(
    new: Membership, signers: Sequence[bytes], current: tuple[Ref, Membership] | None
) -> str | None:
    if current is None:
        return None if new.previous is None else "The membership refers to a missing predecessor."
    ref, council = current
    if new.previous != ref:
        return "The membership does not follow the membership in force."
    if len(set(signers) & set(council.members)) < council.threshold:
        return f"The membership has signatures of fewer than {council.threshold} members in force."
    return None
