"""Recomputation of a ledger's tree from its entries, with a comparison of every stored node.

Stored nodes are a cache. With write access to the store a node can be changed, and proofs made from it would
be wrong. All readers of entries (`view.IncrementalReader`, `witness`, `verify_stored_tree`) therefore compare
the nodes that they recompute with the stored ones.
"""

from __future__ import annotations

from mtlsign.claims import merkle
from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.checkpoints import Checkpoint
from mtlsign.errors import LedgerError

CHUNK = 1024
"""Number of entries after which completed nodes are compared; it bounds the memory."""


class TreeRebuilder:
    """Tree that grows entry by entry and is compared with the nodes that the ledger stores.

    Args:
        ledger: the ledger whose nodes are compared.
        tree: state to continue from; default: the empty tree.
        nodes: receives the hash of each complete subtree by (level, index).
    """

    def __init__(
        self,
        ledger: Ledger,
        tree: merkle.CompactRange | None = None,
        *,
        nodes: dict[tuple[int, int], bytes] | None = None,
    ) -> None:
        self.ledger = ledger
        self.nodes: dict[tuple[int, int], bytes] = {} if nodes is None else nodes
        self.tree = merkle.CompactRange(tree.size, tree.hashes) if tree else merkle.CompactRange()
        self._completed: dict[int, tuple[int, list[bytes]]] = {}

    def add(self, envelope: bytes) -> bytes:
        """Add the next entry and return its leaf hash. Raises LedgerError as `compare_nodes` does."""
        leaf = merkle.leaf_hash(envelope)
        for level, index, digest in self.tree.append(leaf):
            self._completed.setdefault(level, (index, []))[1].append(digest)
            self.nodes[level, index] = digest
        if self.tree.size % CHUNK == 0:
            self.compare_nodes()
        return leaf

    def compare_nodes(self) -> None:
        """Compare the nodes completed since the last call with the stored nodes.

        Raises:
            LedgerError: a stored node is missing or differs from the recomputed one.
        """
        for level, (start, computed) in self._completed.items():
            stored = self.ledger.nodes(level, start, start + len(computed))
            for index, (actual, expected) in enumerate(zip(stored, computed, strict=True), start):
                if actual != expected:
                    raise LedgerError(
                        f"The stored node {level}/{index} does not match the entries: it was damaged or "
                        "changed. Restore the ledger from a copy.",
                        field="ledger",
                    )
        self._completed.clear()

    def finish(self, state: merkle.CompactRange) -> None:
        """Compare the remaining nodes, and the stored state that the next append would extend.

        Raises:
            LedgerError: as `compare_nodes`, or the state does not match the entries.
        """
        self.compare_nodes()
        if (state.size, state.hashes) != (self.tree.size, self.tree.hashes):
            raise LedgerError(
                "The stored tree is not the tree of the entries. Do not use this ledger; run jobs/ledger.py "
                "check.",
                field="ledger",
            )


def verify_stored_tree(ledger: Ledger) -> Checkpoint:
    """Recompute the tree from all entries, compare every stored node, and return the checkpoint.

    Raises:
        LedgerError: a stored node or the stored state is missing or does not match the entries.
    """
    state, rebuilder = ledger.tree_state(), TreeRebuilder(ledger)
    for envelope in ledger.scan(0, state.size):
        rebuilder.add(envelope)
    rebuilder.finish(state)
    return Checkpoint(ledger.origin(), state.size, rebuilder.tree.root())
