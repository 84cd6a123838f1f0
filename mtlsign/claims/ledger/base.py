"""Ledger interface: an append-only list of envelopes, the Merkle tree over them, and co-signed checkpoints.

Both backends store entries, the hashes of complete subtrees, and co-signatures. Neither is trusted, because
write access to the store allows rewriting it. Therefore every proof is checked before it is returned, readers
recompute the tree from the entries (`rebuild`), and a `witness` co-signs only extensions of the tree it
co-signed before.
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
    """Consistency of the answers that a reader received.

    Attributes:
        current: the answer comes from a majority (or from the local file), so it contains every acknowledged
            entry.
        note: one sentence for display; it describes the lag when `current` is False.
    """

    current: bool
    note: str


class Ledger(abc.ABC):
    """One ledger. Every method raises LedgerError if the store is unreachable, damaged or refuses."""

    uri: str

    @property
    def store_id(self) -> str:
        """Identifier of the store, independent of the spelling of its URI. A witness pins an origin to it."""
        return self.uri

    @abc.abstractmethod
    def append(self, envelope: bytes) -> int:
        """Add an entry and return its index. Bytes that exist already keep their index.

        When the method returns, the entry is durable. After a LedgerError the outcome is unknown; call the
        method once more with the same bytes.
        """

    @abc.abstractmethod
    def get(self, index: int) -> bytes:
        """Return the bytes of an entry."""

    @abc.abstractmethod
    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the entries start … stop-1 in order and without gaps. Default: up to the newest entry."""

    @abc.abstractmethod
    def find(self, leaf: bytes) -> int | None:
        """Return the index of the entry with this leaf hash, or None."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return the number of entries."""

    @abc.abstractmethod
    def tree_state(self) -> merkle.CompactRange:
        """Return the stored tree that the next append extends. It is unverified (see `rebuild`)."""

    @abc.abstractmethod
    def node(self, level: int, index: int) -> bytes:
        """Return the stored hash of a complete subtree, 32 bytes (a `merkle.NodeReader`)."""

    @abc.abstractmethod
    def nodes(self, level: int, start: int, stop: int) -> list[bytes]:
        """Return the stored hashes start … stop-1 of one level.

        Raises:
            LedgerError: a hash is missing.
        """

    @abc.abstractmethod
    def store_cosignature(self, checkpoint: Checkpoint, line: Cosignature) -> None:
        """Store a co-signature. Lines from any sender are stored, so no line can block a member's line."""

    @abc.abstractmethod
    def cosignatures(self, origin: bytes) -> list[tuple[Checkpoint, Cosignature]]:
        """Return all stored co-signatures by size, as checkpoints of the ledger `origin`, unverified."""

    @abc.abstractmethod
    def staleness(self) -> ReadConsistency:
        """Return how far the answers of this object may lag behind."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release files and connections."""

    def origin(self) -> bytes:
        """Return the leaf hash of entry 0, which identifies this ledger."""
        if self.size() == 0:
            raise LedgerError(
                "The ledger is empty. Create it first with jobs/ledger.py create.", field="ledger"
            )
        return merkle.leaf_hash(self.get(0))

    def checkpoint(self, size: int | None = None) -> Checkpoint:
        """Return the checkpoint over the first `size` entries (default: all) from the stored hashes."""
        entry_count = self.size()
        count = entry_count if size is None else size
        if not 0 <= count <= entry_count:
            raise LedgerError(
                f"The ledger has {entry_count} entries, not {count}. Pass a smaller size.", field="size"
            )
        root = self._with_stored_nodes(lambda node: merkle.tree_root(node, count))
        return Checkpoint(self.origin(), count, root)

    def read_nodes(self, positions: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Return stored nodes by (level, index). A remote backend reads them in one request."""
        return {(level, index): self.node(level, index) for level, index in positions}

    def _with_stored_nodes(self, compute: Callable[[merkle.NodeReader], T]) -> T:
        """Return `compute(node)`; the nodes it requests must not depend on their values."""
        positions: dict[tuple[int, int], bytes] = {}
        compute(lambda level, index: positions.setdefault((level, index), bytes(32)))
        stored = self.read_nodes(list(positions))
        return compute(lambda level, index: stored[level, index])

    def prove(self, index: int, size: int) -> list[bytes]:
        """Return the inclusion path of entry `index`, checked against the entry and `checkpoint(size)`.

        Raises:
            LedgerError: the tree of `size` lacks the entry, or the stored nodes do not prove it.
        """
        if not 0 <= index < size <= self.size():
            raise LedgerError(
                f"Entry {index} is not in a tree of {size} entries. Pass another index or size.",
                field="index",
            )
        path, root = self._with_stored_nodes(
            lambda node: (merkle.inclusion_path(node, index, size), merkle.tree_root(node, size))
        )
        if not merkle.verify_inclusion(merkle.leaf_hash(self.get(index)), index, size, path, root):
            raise _inconsistent_tree_error(f"prove entry {index}")
        return path

    def prove_consistency(self, old: int, new: int) -> list[bytes]:
        """Return the proof that the tree of `new` entries extends that of `old`, checked against both roots.

        Raises:
            LedgerError: there are no such trees, or the stored nodes do not prove it.
        """
        if not 0 <= old <= new <= self.size():
            raise LedgerError(
                f"A tree of {new} entries does not extend one of {old} here. Pass other sizes.", field="size"
            )
        path, roots = self._with_stored_nodes(
            lambda node: (
                merkle.consistency_path(node, old, new),
                (merkle.tree_root(node, old), merkle.tree_root(node, new)),
            )
        )
        if not merkle.verify_consistency(old, roots[0], new, roots[1], path):
            raise _inconsistent_tree_error(f"prove that {new} entries extend {old}")
        return path

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _inconsistent_tree_error(claim: str) -> LedgerError:
    return LedgerError(
        f"The stored tree does not {claim}: a node was damaged or changed. Run jobs/ledger.py check, then "
        "restore the ledger from a copy.",
        field="ledger",
    )


def check_size(envelope: bytes) -> None:
    """Raise LedgerError for an entry that is empty or over 64 KiB."""
    if not 1 <= len(envelope) <= MAX_ENVELOPE:
        raise LedgerError(
            f"The entry has {len(envelope)} bytes. Use 1 to {MAX_ENVELOPE} bytes.", field="entry"
        )
