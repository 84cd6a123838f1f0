"""Verified view of a ledger: valid statements, councils, confirmed checkpoints and the time of each entry.

`LedgerView.from_entries` is a pure function of bytes: the same entries and co-signatures give the same view
to every reader. Malformed entries, statements of another ledger and repeated entries remain visible with
their problem; they have no effect.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.ledger.confirmation import (
    ConfirmedCheckpoint,
    LineCache,
    confirm_checkpoints,
    council_in_force,
    member_times,
)
from mtlsign.claims.ledger.rebuild import TreeRebuilder
from mtlsign.claims.statements.parsing import disclosed_opening, open_statement
from mtlsign.claims.statements.types import Claim, Membership, Ref, Statement
from mtlsign.errors import ClaimError, LedgerError
from mtlsign.watermark.keys.opening import KeyOpening

S = TypeVar("S", bound=Statement)


@dataclass(frozen=True, slots=True)
class Entry:
    """Ledger entry. `statement` is None if the entry has no effect; `problem` then gives the reason.

    `opening` is the key that the bytes of a claim make public, also if the claim itself has no effect.
    """

    index: int
    leaf: bytes
    statement: Statement | None
    signers: tuple[bytes, ...] = ()
    problem: str | None = None
    opening: KeyOpening | None = None

    @property
    def ref(self) -> Ref:
        """Reference by which other statements name this entry."""
        return Ref(self.index, self.leaf)


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
        rows, tree, nodes = dict(enumerate(envelopes)), merkle.CompactRange(), dict[tuple[int, int], bytes]()
        for envelope in rows.values():
            nodes.update({(k, i): digest for k, i, digest in tree.append(merkle.leaf_hash(envelope))})
        return cls.assemble(rows, cosignatures, _roots(cosignatures, nodes, len(rows)))

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
        log = EntryLog()
        for index in sorted(rows):
            log.add(index, rows[index])
        return cls.of_log(log, cosignatures, roots, LineCache())

    @classmethod
    def of_log(
        cls,
        log: EntryLog,
        cosignatures: Iterable[tuple[Checkpoint, Cosignature]],
        roots: Mapping[int, bytes],
        cache: LineCache,
    ) -> LedgerView:
        """Build the view of the entries that a log has read.

        Args:
            log: the entries.
            cosignatures: stored co-signatures, unverified.
            roots: verified root of each co-signed size.
            cache: results of earlier signature checks.

        Raises:
            LedgerError: as `from_entries`.
        """
        origin, councils = log.origin, tuple(log.councils)
        own_lines = ((tree, line) for tree, line in cosignatures if tree.origin == origin)
        times = member_times(councils, own_lines, cache)
        confirmed, warnings = confirm_checkpoints(councils, times, roots)
        sizes = [item.checkpoint.size for item in confirmed]
        return cls(origin, dict(log.entries), councils, confirmed, warnings, sizes)

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
        return council_in_force(self.councils, index)

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


ParsedEntry = tuple[Statement | None, tuple[bytes, ...], str | None, KeyOpening | None]
StatementCache = dict[bytes, ParsedEntry]
"""Content of entries by leaf hash. Entries never change, and each one costs a signature check."""


class EntryLog:
    """Entries read so far, and the councils among them.

    Args:
        statements: content of entries that were read before; new content is added.
    """

    def __init__(self, statements: StatementCache | None = None) -> None:
        self.statements: StatementCache = {} if statements is None else statements
        self.entries: dict[int, Entry] = {}
        self.councils: list[tuple[int, Membership]] = []
        self._first_index: dict[bytes, int] = {}

    @property
    def origin(self) -> bytes:
        """Leaf hash of entry 0. Raises LedgerError for an empty log."""
        if not self.entries:
            raise LedgerError(
                "The ledger is empty. Create it first with jobs/ledger.py create.", field="ledger"
            )
        return self.entries[0].leaf

    def add(self, index: int, data: bytes) -> Entry:
        """Add the next entry and return it. Raises LedgerError if entry 0 does not create a ledger."""
        leaf = merkle.leaf_hash(data)
        if leaf not in self.statements:
            self.statements[leaf] = _parse_entry(data)
        statement, signers, problem, opening = self.statements[leaf]
        problem = problem or self._problem(statement, signers, leaf)
        if problem is not None:
            statement, signers = None, ()
        if not self.entries and (index != 0 or not isinstance(statement, Membership)):
            reason = f" ({problem})" if problem else ""
            raise LedgerError(
                f"Entry 0 is not the membership that creates a ledger{reason}. Open another ledger.",
                field="ledger",
            )
        if isinstance(statement, Membership):
            self.councils.append((index, statement))
        self._first_index.setdefault(leaf, index)
        self.entries[index] = Entry(index, leaf, statement, signers, problem, opening)
        return self.entries[index]

    def _problem(self, statement: Statement | None, signers: tuple[bytes, ...], leaf: bytes) -> str | None:
        """Return the reason why an entry has no effect at this position, or None."""
        if leaf in self._first_index:
            return f"The entry repeats entry {self._first_index[leaf]}."
        if statement is not None and statement.ledger != (self.entries[0].leaf if self.entries else None):
            return "The statement was made for another ledger."
        if not isinstance(statement, Membership):
            return None
        if not self.councils:
            return None if statement.previous is None else "The membership refers to a missing predecessor."
        index, council = self.councils[-1]
        if statement.previous != self.entries[index].ref:
            return "The membership does not follow the membership in force."
        if len(set(signers) & set(council.members)) < council.threshold:
            return f"The membership has signatures of fewer than {council.threshold} members in force."
        return None


def read_ledger(ledger: Ledger) -> LedgerView:
    """Return the current view of a whole ledger. Raises LedgerError as `IncrementalReader.view` does."""
    return IncrementalReader(ledger).view()


class IncrementalReader:
    """Reader that fetches and verifies only new entries on each call. A witness reads all entries.

    Args:
        ledger: the ledger.
        earlier: a reader of the same ledger, whose entries are not read once more.

    Attributes:
        cache: results of the signature checks of co-signatures.
    """

    def __init__(self, ledger: Ledger, earlier: IncrementalReader | None = None) -> None:
        self.ledger = ledger
        self._log: EntryLog = EntryLog() if earlier is None else earlier._log
        self._tree: merkle.CompactRange = merkle.CompactRange() if earlier is None else earlier._tree
        self._nodes: dict[tuple[int, int], bytes] = {} if earlier is None else earlier._nodes
        self.cache: LineCache = LineCache() if earlier is None else earlier.cache

    @property
    def statements(self) -> StatementCache:
        """Content of all entries that were read."""
        return self._log.statements

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
            message = (
                f"The ledger has {state.size} entries, but had {self._tree.size} before: it was truncated or "
                "restored from an older copy. Do not use it; restore a complete copy and ask its members."
            )
            raise LedgerError(message if consistency.current else consistency.note, field="ledger")
        rebuilder = TreeRebuilder(self.ledger, self._tree, nodes=self._nodes)
        fresh = []
        for envelope in self.ledger.scan(self._tree.size, state.size):
            fresh.append(envelope)
            rebuilder.add(envelope)
        rebuilder.finish(state)
        for index, envelope in enumerate(fresh, self._tree.size):  # last, so that a failed read is repeated
            self._log.add(index, envelope)
        self._tree = rebuilder.tree
        roots = _roots(cosignatures, self._nodes, self._tree.size)
        return LedgerView.of_log(self._log, cosignatures, roots, self.cache)


def _roots(
    cosignatures: Iterable[tuple[Checkpoint, Cosignature]], nodes: Mapping[tuple[int, int], bytes], size: int
) -> dict[int, bytes]:
    """Return the root of each co-signed size up to `size`, from the hashes of complete subtrees."""
    sizes = {checkpoint.size for checkpoint, _ in cosignatures if checkpoint.size <= size}
    return {
        count: merkle.tree_root(lambda level, index: nodes[level, index], count)
        for count in sizes
    }  # fmt: skip


def _parse_entry(data: bytes) -> ParsedEntry:
    try:
        statement, signers = open_statement(data)
    except ClaimError as error:
        return None, (), str(error), disclosed_opening(data)
    return statement, signers, None, statement.opening if isinstance(statement, Claim) else None
