"""What a ledger is: an append-only list of envelopes, the Merkle tree over them, and co-signatures of its
heads.

Both backends store entries, the hashes of complete subtrees, and co-signatures. None of them is trusted:
whoever can write to the store can also rewrite it, so no proof is handed out unchecked, readers recompute the
tree from the entries (`recompute`), and witnesses (`witness`) refuse to co-sign what does not extend what
they saw.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mtlsign.claims import merkle
from mtlsign.claims.ledger.checkpoints import Checkpoint, Cosignature
from mtlsign.claims.statements.envelope import MAX_ENVELOPE
from mtlsign.errors import LedgerError

T = TypeVar("T")


@dataclass(frozen=True)
class ReadConsistency:
    """How far a reader may trust that it saw the newest entries.

    Attributes:
        current: the answer came through a majority (or from the one local file), so nothing acknowledged is
            missing.
        note: one sentence for a person; what is known when it is not current.
    """

    current: bool
    note: str


class Ledger(abc.ABC):
    """One ledger. Methods raise LedgerError when the store cannot be reached, is damaged or refuses."""

    uri: str

    @property
    def place(self) -> str:
        """The store, however its URI was spelled: what a witness pins an origin to."""
        return self.uri

    @abc.abstractmethod
    def append(self, envelope: bytes) -> int:
        """Add an entry and return its index. The same bytes again: the index they already have.

        When it returns, the entry is durable. After a LedgerError it may or may not be there: call it again.
        """

    @abc.abstractmethod
    def get(self, index: int) -> bytes:
        """The entry's bytes."""

    @abc.abstractmethod
    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Entries start … stop-1 (default: all there are now), in order, none missing."""

    @abc.abstractmethod
    def find(self, leaf: bytes) -> int | None:
        """Index of the entry whose leaf hash this is."""

    @abc.abstractmethod
    def size(self) -> int:
        """Number of entries."""

    @abc.abstractmethod
    def state(self) -> merkle.CompactRange:
        """The tree that the next append goes on from. As stored: compare it (`recompute`)."""

    @abc.abstractmethod
    def node(self, level: int, index: int) -> bytes:
        """Stored hash of a complete subtree, 32 bytes, as `merkle.Node`."""

    @abc.abstractmethod
    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:
        """Stored hashes start … stop-1 of one level. Raises LedgerError when one is missing."""

    @abc.abstractmethod
    def cosign(self, head: Checkpoint, line: Cosignature) -> None:
        """Store a co-signature. Anybody's line is kept, so nobody can keep another's place."""

    @abc.abstractmethod
    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:
        """All stored co-signatures by size, as heads of the ledger `origin`. Nothing is verified."""

    @abc.abstractmethod
    def freshness(self) -> ReadConsistency:
        """How far the answers of this object may be behind."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of files and connections."""

    def origin(self) -> bytes:
        """Hash of entry 0, which names this ledger."""
        if self.size() == 0:
            raise LedgerError("is empty: found it first (jobs/ledger.py found)", field="ledger")
        return merkle.leaf_hash(self.get(0))

    def head(self, size: int | None = None) -> Checkpoint:
        """The tree over the first `size` entries (default: all), from the stored hashes."""
        there = self.size()
        count = there if size is None else size
        if not 0 <= count <= there:
            raise LedgerError(f"has {there} entries, not {count}; ask for a smaller tree", field="size")
        return Checkpoint(self.origin(), count, self._computed(lambda node: merkle.tree_root(node, count)))

    def fetch(self, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Several stored nodes by (level, index); a backend that is far away gets them at once."""
        return {(level, index): self.node(level, index) for level, index in wanted}

    def _computed(self, compute: Callable[[merkle.NodeReader], T]) -> T:
        """`compute` with the nodes that it asks for, which it may not choose by what they hold."""
        wanted: dict[tuple[int, int], bytes] = {}
        compute(lambda level, index: wanted.setdefault((level, index), bytes(32)))
        found = self.fetch(list(wanted))
        return compute(lambda level, index: found[level, index])

    def prove(self, index: int, size: int) -> list[bytes]:
        """Inclusion path of entry `index` in the tree of `size`, checked against the entry and `head(size)`.

        Raises:
            LedgerError: the entry is not in it, or the stored nodes do not prove it.
        """
        if not 0 <= index < size <= self.size():
            raise LedgerError(f"entry {index} is not in a tree of {size}; ask for another", field="index")
        path, root = self._computed(
            lambda node: (merkle.inclusion_path(node, index, size), merkle.tree_root(node, size))
        )
        if not merkle.verify_inclusion(merkle.leaf_hash(self.get(index)), index, size, path, root):
            raise _bad_tree(f"prove entry {index}")
        return path

    def prove_consistency(self, old: int, new: int) -> list[bytes]:
        """Proof that the tree of `new` extends that of `old`, checked against `head(old)` and `head(new)`.

        Raises:
            LedgerError: there are no such trees, or the stored nodes do not prove it.
        """
        if not 0 <= old <= new <= self.size():
            raise LedgerError(f"a tree of {new} does not extend one of {old}; ask for others", field="size")
        path, roots = self._computed(
            lambda node: (
                merkle.consistency_path(node, old, new),
                (merkle.tree_root(node, old), merkle.tree_root(node, new)),
            )
        )
        if not merkle.verify_consistency(old, roots[0], new, roots[1], path):
            raise _bad_tree(f"prove that {new} entries extend {old}")
        return path

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bad_tree(what: str) -> LedgerError:
    return LedgerError(
        f"its stored tree does not {what}: a node was damaged or changed; run jobs/ledger.py check, then "
        "restore a copy",
        field="ledger",
    )


def check_size(envelope: bytes) -> None:
    """Raises LedgerError for an entry that is empty or over 64 KiB."""
    if not 1 <= len(envelope) <= MAX_ENVELOPE:
        raise LedgerError(f"an entry has 1 to {MAX_ENVELOPE} bytes, not {len(envelope)}", field="entry")
