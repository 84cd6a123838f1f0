"""A reader's checked picture of a ledger: which entries say what, which heads count, when each entry came.

`View.of` is a pure function of bytes: entries and co-signatures in, the same picture for everybody out. Junk,
statements carried over from another ledger and repeated entries stay visible with their problem, and mean
nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from mtlsign.claims import merkle
from mtlsign.claims.ledger import checkpoints as heads
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.rebuild import TreeRebuilder
from mtlsign.claims.statements.parsing import open_statement
from mtlsign.claims.statements.types import Membership, Ref, Statement
from mtlsign.errors import ClaimError, LedgerError

S = TypeVar("S", bound=Statement)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. `statement` is None where `problem` says why it means nothing."""

    index: int
    leaf: bytes
    statement: Statement | None
    signers: tuple[bytes, ...] = ()
    problem: str | None = None

    @property
    def ref(self) -> Ref:
        """How other statements name this entry."""
        return Ref(self.index, self.leaf)


@dataclass(frozen=True, slots=True)
class ConfirmedCheckpoint:
    """A head with enough members' co-signatures: who signed it and when; `time` never runs backwards."""

    head: Checkpoint
    times: Mapping[bytes, int]
    time: int


@dataclass(frozen=True)
class LedgerView:
    """The picture. `councils` are (index, membership), each in force for what comes after it."""

    origin: bytes
    entries: Mapping[int, Entry]
    councils: tuple[tuple[int, Membership], ...]
    heads: tuple[ConfirmedCheckpoint, ...]
    remarks: tuple[str, ...] = ()
    _sizes: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, envelopes: Iterable[bytes], signed: Sequence[tuple[Checkpoint, Cosignature]]) -> LedgerView:
        """From all of a ledger's entries in order, and the co-signatures stored beside them.

        Raises:
            LedgerError: entry 0 founds no ledger; or a tree that enough members co-signed is not the one that
                these entries make: the ledger was truncated, forked or rewritten.
        """
        wanted = {head.size for head, _ in signed}
        tree, roots, raw = merkle.CompactRange(), {0: merkle.EMPTY_ROOT}, {}
        for index, envelope in enumerate(envelopes):
            raw[index] = envelope
            tree.append(merkle.leaf_hash(envelope))
            if tree.size in wanted:
                roots[tree.size] = tree.root()
        return cls.assemble(raw, signed, roots)

    @classmethod
    def assemble(
        cls,
        raw: Mapping[int, bytes],
        signed: Sequence[tuple[Checkpoint, Cosignature]],
        roots: Mapping[int, bytes],
    ) -> LedgerView:
        """From some entries (0 among them), co-signatures, and the true root of each co-signed size."""
        entries, councils = _read_entries(raw)
        origin, remarks = entries[0].leaf, []
        found: dict[tuple[int, bytes], list[Cosignature]] = {}
        for head, line in signed:
            if head.origin == origin:
                found.setdefault((head.size, head.root), []).append(line)
        counted: list[ConfirmedCheckpoint] = []
        now = 0
        for (size, root), lines in sorted(found.items()):
            council = _in_force(councils, size)
            head = Checkpoint(origin, size, root)
            times = _times(head, lines, council)
            if not times:
                continue
            enough = len(times) >= council.threshold
            if roots.get(size) != root:
                who = ", ".join(member.hex()[:16] for member in sorted(times))
                what = "is cut short" if size not in roots else "is not the one that was co-signed"
                sentence = f"the ledger {what}: {who} co-signed another tree of {size} entries"
                if enough:
                    raise LedgerError(f"{sentence}; trust none of it, ask the members", field="ledger")
                remarks.append(sentence)
            elif enough:
                now = max(now, heads.median(times.values()))
                counted.append(ConfirmedCheckpoint(head, times, now))
        return cls(
            origin, entries, tuple(councils), tuple(counted), tuple(remarks), [c.head.size for c in counted]
        )

    def first_head(self, index: int) -> ConfirmedCheckpoint | None:
        """The first head that counts and holds entry `index`."""
        at = bisect.bisect_right(self._sizes, index)
        return self.heads[at] if at < len(self.heads) else None

    def time(self, index: int) -> int | None:
        """When entry `index` came (POSIX seconds, median of its first head's co-signers); None: not yet."""
        head = self.first_head(index)
        return None if head is None else head.time

    def council(self, index: int) -> Membership:
        """The membership in force for entry `index`."""
        return _in_force(self.councils, index)

    def all(self, kind: type[S]) -> Iterator[tuple[Entry, S]]:
        """Entries of one kind, in order."""
        for entry in self.entries.values():
            if isinstance(entry.statement, kind):
                yield entry, entry.statement

    def at(self, ref: Ref, kind: type[S]) -> S | None:
        """The statement at `ref`, if number and hash agree and it is of that kind."""
        entry = self.entries.get(ref.index)
        if entry is None or entry.leaf != ref.leaf or not isinstance(entry.statement, kind):
            return None
        return entry.statement

    def self_attested(self, index: int, owner: bytes) -> bool:
        """Whether nobody but `owner` co-signed the first head that holds the entry."""
        head = self.first_head(index)
        return head is None or set(head.times) <= {owner}


def read_ledger(ledger: Ledger) -> LedgerView:
    """The picture of a whole ledger as it is now. Raises LedgerError as `View.of` and the ledger do."""
    return IncrementalReader(ledger).view()


class IncrementalReader:
    """Looks at one ledger again and again, and fetches only what is new. For owners; a witness reads it
    all.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._raw: list[bytes] = []
        self._tree = merkle.CompactRange()

    def view(self) -> LedgerView:
        """The picture now, its tree made anew from the entries.

        Raises:
            LedgerError: what was there before is not there any more, or a stored node is not what the entries
                make.
        """
        signed = self.ledger.cosignatures(self.ledger.origin())  # first, so that none is younger than entries
        state, fresh = self.ledger.state(), self.ledger.freshness()
        if state.size < self._tree.size:
            what = "is shorter than it was; trust it no more" if fresh.current else fresh.note
            raise LedgerError(what, field="ledger")
        rows, again = list(self._raw), TreeRebuilder(self.ledger, self._tree)
        for envelope in self.ledger.scan(self._tree.size, state.size):
            rows.append(envelope)
            again.add(envelope)
        again.finish(state)
        view = LedgerView.of(rows, signed)
        self._raw, self._tree = rows, again.tree  # only now: what failed is looked at again
        return view


@lru_cache(maxsize=16_384)
def _unsealed(data: bytes) -> tuple[Statement, tuple[bytes, ...]]:
    """As `unseal`, remembered: entries never change, and each costs a signature check."""
    return open_statement(data)


def _times(head: Checkpoint, lines: Sequence[Cosignature], council: Membership) -> dict[bytes, int]:
    """As `heads.times`, but one bad line beside good ones (anybody can write some) only drops itself."""
    found = {member: heads.earliest_valid_line(head, lines, member) for member in council.members}
    return {member: line.time for member, line in found.items() if line is not None}


def _in_force(councils: Sequence[tuple[int, Membership]], index: int) -> Membership:
    at = bisect.bisect_left([i for i, _ in councils], index)
    return councils[max(at - 1, 0)][1]


def _read_entries(raw: Mapping[int, bytes]) -> tuple[dict[int, Entry], list[tuple[int, Membership]]]:
    entries: dict[int, Entry] = {}
    councils: list[tuple[int, Membership]] = []
    seen: dict[bytes, int] = {}
    current: tuple[Ref, Membership] | None = None
    for index in sorted(raw):
        leaf = merkle.leaf_hash(raw[index])
        entry = _entry(index, leaf, raw[index], entries[0].leaf if entries else None)
        if leaf in seen:
            entry = Entry(index, leaf, None, problem=f"repeats entry {seen[leaf]}")
        seen.setdefault(leaf, index)
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
                "does not begin with the membership that founds it; give the right ledger", field="ledger"
            )
        entries[index] = entry
    if not entries:
        raise LedgerError("is empty: found it first (jobs/ledger.py found)", field="ledger")
    return entries, councils


def _entry(index: int, leaf: bytes, data: bytes, origin: bytes | None) -> Entry:
    try:
        statement, signers = _unsealed(data)
    except ClaimError as error:
        return Entry(index, leaf, None, problem=str(error))
    if statement.ledger != origin:
        return Entry(index, leaf, None, problem="was made for another ledger")
    return Entry(index, leaf, statement, signers)


def _membership_problem(
    new: Membership, signers: Sequence[bytes], current: tuple[Ref, Membership] | None
) -> str | None:
    if current is None:
        return None if new.previous is None else "changes a council that is not there"
    ref, council = current
    if new.previous != ref:
        return "does not follow the membership in force"
    if len(set(signers) & set(council.members)) < council.threshold:
        return f"is signed by fewer than {council.threshold} of the members in force"
    return None
