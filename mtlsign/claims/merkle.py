"""Merkle trees of RFC 6962 §2.1 and RFC 9162 §2.1: hashes, inclusion proofs and consistency proofs.

A tree of n leaves consists of *perfect* subtrees: node (level, i) covers the 2^level leaves from i·2^level.
A store of the complete subtrees (at most 2n hashes) can compute any proof from O(log n) of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

#: Reads the hash of the complete subtree (level, index). Level 0 holds the leaf hashes.
NodeReader = Callable[[int, int], bytes]
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_SIZE = 2**40
"""Maximum number of leaves. A proof therefore has at most 40 hashes (inclusion) or 41 (consistency)."""
MAX_PROOF = 41


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class CompactRange:
    """Minimal state of a growing tree: roots of its perfect subtrees, from which the tree's root follows."""

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """Start from a stored state. `hashes` belong to the 1-bits of `size`, largest subtree first.

        Raises:
            ValueError: the hashes do not fit the size.
        """
        if not 0 <= size <= MAX_SIZE or len(hashes) != size.bit_count() or any(len(h) != 32 for h in hashes):
            raise ValueError("a compact range has one 32-byte hash for each 1-bit of its size")
        self.size, self.hashes = size, list(hashes)

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Add a leaf hash. Return the subtrees it completes as (level, index, hash), leaf first."""
        level, index, digest = 0, self.size, leaf
        completed = [(level, index, digest)]
        while index & 1:
            level, index, digest = level + 1, index >> 1, node_hash(self.hashes.pop(), digest)
            completed.append((level, index, digest))
        self.hashes.append(digest)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """Return the root of the current tree, 32 bytes."""
        return _fold(self.hashes) if self.hashes else EMPTY_ROOT


def compact_range(nodes: Mapping[tuple[int, int], bytes], size: int) -> CompactRange:
    """Return the state of the tree of the first `size` leaves.

    Args:
        nodes: hashes of complete subtrees by (level, index).
        size: number of leaves.
    """
    levels = [level for level in range(size.bit_length() - 1, -1, -1) if size >> level & 1]
    return CompactRange(size, [nodes[level, (size >> level) - 1] for level in levels])


def _fold(roots: Sequence[bytes]) -> bytes:
    root = roots[-1]
    for left in reversed(roots[:-1]):
        root = node_hash(left, root)
    return root


def root_from_leaves(leaves: Iterable[bytes]) -> bytes:
    """Return the root over leaf hashes in order."""
    tree = CompactRange()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def _subtree(node: NodeReader, start: int, stop: int) -> bytes:
    """Return the root over the leaves start … stop-1.

    `start` must be a multiple of the smallest power of two that is at least the length of the range.
    """
    roots = []
    while start < stop:
        level = (stop - start).bit_length() - 1
        roots.append(node(level, start >> level))
        start += 1 << level
    return _fold(roots)


def tree_root(node: NodeReader, size: int) -> bytes:
    """Return the root of the first `size` leaves."""
    return _subtree(node, 0, size) if size else EMPTY_ROOT


def _split(size: int) -> int:
    """Return the largest power of two below `size` (k in RFC 6962)."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_path(node: NodeReader, index: int, size: int) -> list[bytes]:
    """Return PATH(index, D[size]) of RFC 6962 §2.1.1, lowest sibling first.

    Args:
        node: reader of the stored subtree hashes.
        index: number of the leaf, from 0.
        size: number of leaves of the tree.

    Raises:
        ValueError: outside 0 ≤ index < size.
    """
    if not 0 <= index < size <= MAX_SIZE:
        raise ValueError(f"index {index} is not in a tree of {size}")
    path, start, stop = [], 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            path.append(_subtree(node, middle, stop))
            stop = middle
        else:
            path.append(_subtree(node, start, middle))
            start = middle
    return path[::-1]


def consistency_path(node: NodeReader, old: int, new: int) -> list[bytes]:
    """Return PROOF(old, D[new]) of RFC 6962 §2.1.2. It is empty for old = 0 or old = new.

    Args:
        node: reader of the stored subtree hashes.
        old: number of leaves of the earlier tree.
        new: number of leaves of the later tree.

    Raises:
        ValueError: outside 0 ≤ old ≤ new.
    """
    if not 0 <= old <= new <= MAX_SIZE:
        raise ValueError(f"a tree of {new} does not extend one of {old}")
    if old in (0, new):
        return []
    # SUBPROOF(m, D[start:stop], b) of the RFC: `old` counts from `start`, and `root_is_known` is b.
    path, start, stop, root_is_known = [], 0, new, True
    while old != stop - start:
        middle = start + _split(stop - start)
        if old <= middle - start:
            path.append(_subtree(node, middle, stop))
            stop = middle
        else:
            path.append(_subtree(node, start, middle))
            old -= middle - start
            start, root_is_known = middle, False
    if not root_is_known:
        path.append(_subtree(node, start, stop))
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Return whether an inclusion proof is valid (RFC 9162 §2.1.3.2).

    Args:
        leaf: hash of the leaf, 32 bytes.
        index: number of the leaf, from 0.
        size: number of leaves of the tree.
        path: sibling hashes, lowest first, 32 bytes each.
        root: root of the tree, 32 bytes.
    """
    if not 0 <= index < size <= MAX_SIZE or len(path) > MAX_PROOF or any(len(p) != 32 for p in path):
        return False
    number, last, digest = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if number & 1 or number == last:
            digest = node_hash(sibling, digest)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            digest = node_hash(digest, sibling)
        number, last = number >> 1, last >> 1
    return last == 0 and digest == root


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Return whether a consistency proof is valid (RFC 9162 §2.1.4.2).

    Args:
        old: number of leaves of the earlier tree.
        old_root: its root, 32 bytes.
        new: number of leaves of the later tree.
        new_root: its root, 32 bytes.
        path: hashes of the proof, 32 bytes each.
    """
    if not 0 <= old <= new <= MAX_SIZE or len(path) > MAX_PROOF or any(len(p) != 32 for p in path):
        return False
    if old == new:
        return not path and old_root == new_root
    if old == 0:
        return not path and old_root == EMPTY_ROOT
    if old & (old - 1) == 0:
        path = [old_root, *path]
    if not path:
        return False
    number, last = old - 1, new - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    first = second = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if number & 1 or number == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            second = node_hash(second, sibling)
        number, last = number >> 1, last >> 1
    return last == 0 and first == old_root and second == new_root
