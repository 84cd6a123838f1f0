"""A ledger's tree made anew from its entries, and everything that is stored of it compared on the way.

Stored nodes are a convenience: whoever can write to the store can change one, and proofs made from it would
be wrong. So whoever reads entries (`view.Reader`, `witness`, `check`) compares the nodes that they make.
"""

from __future__ import annotations

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint
from mtlsign.errors import LedgerError

CHUNK = 1024
"""Entries after which the nodes that they complete are compared; bounds the memory."""


class TreeRebuilder:
    """Grows a tree entry by entry, from `tree` on, and compares the ledger's stored nodes with its own."""

    def __init__(self, ledger: Ledger, tree: merkle.CompactRange | None = None) -> None:
        self.ledger = ledger
        self.tree = merkle.CompactRange(tree.size, tree.hashes) if tree else merkle.CompactRange()
        self._made: dict[int, tuple[int, list[bytes]]] = {}

    def add(self, envelope: bytes) -> bytes:
        """The next entry; returns its leaf hash. Raises LedgerError as `compare`, every CHUNK entries."""
        leaf = merkle.leaf_hash(envelope)
        for level, index, found in self.tree.append(leaf):
            self._made.setdefault(level, (index, []))[1].append(found)
        if self.tree.size % CHUNK == 0:
            self.compare()
        return leaf

    def compare(self) -> None:
        """Compare the nodes completed since the last call.

        Raises:
            LedgerError: a stored node is missing or not what the entries make.
        """
        for level, (start, made) in self._made.items():
            stored = self.ledger.nodes(level, start, start + len(made))
            for at, (found, right) in enumerate(zip(stored, made, strict=True), start):
                if found != right:
                    raise LedgerError(
                        f"has a node ({level}/{at}) that its entries do not make: the stored tree was "
                        "damaged or changed; restore a copy",
                        field="ledger",
                    )
        self._made.clear()

    def finish(self, state: merkle.CompactRange) -> None:
        """After the last entry: compare the rest, and the stored state that the next append goes on from.

        Raises:
            LedgerError: as `compare`; or the state is that of other entries.
        """
        self.compare()
        if (state.size, state.hashes) != (self.tree.size, self.tree.hashes):
            raise LedgerError(
                "has a stored tree that is not the tree of its entries; trust none of it, check it",
                field="ledger",
            )


def verify_stored_tree(ledger: Ledger) -> Checkpoint:
    """Recompute the whole tree from the entries and compare every stored node with it; returns the head.

    Raises:
        LedgerError: a node is missing or not what the entries make, or the state is not.
    """
    state, again = ledger.state(), TreeRebuilder(ledger)
    for envelope in ledger.scan(0, state.size):
        again.add(envelope)
    again.finish(state)
    return Checkpoint(ledger.origin(), state.size, again.tree.root())
