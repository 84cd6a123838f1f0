"""Merkle trees of RFC 6962 §2.1 / RFC 9162 §2.1: hashes, inclusion and consistency proofs.

A tree of n leaves is made of *perfect* subtrees: node (level, i) covers the 2^level leaves from i·2^level.
Whoever stores the complete ones (at most 2n hashes) proves anything with O(log n) of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

#: Reads the hash of the complete subtree (level, index); level 0 are the leaves' hashes.
NodeReader = Callable[[int, int], bytes]
EMPTY_ROOT = hashlib.sha256(b"").digest()
MAX_SIZE = 2**40
"""Most leaves of a tree here; so a proof has at most 40 hashes (inclusion) or 41 (consistency)."""
MAX_PROOF = 41


def leaf_hash(data: bytes) -> bytes:
    """Hash of a leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class CompactRange:
    """What one must keep to append to a tree and know its root: the roots of its perfect subtrees."""

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """`hashes` are the 1-bits of `size`, largest first. Raises ValueError when they do not fit."""
        if not 0 <= size <= MAX_SIZE or len(hashes) != size.bit_count() or any(len(h) != 32 for h in hashes):
            raise ValueError("a frontier holds one 32-byte hash for each 1-bit of its size")
        self.size, self.hashes = size, list(hashes)

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Add a leaf's hash; returns the subtrees that it completes, as (level, index, hash), leaf first."""
        level, index, found = 0, self.size, leaf
        done = [(level, index, found)]
        while index & 1:
            level, index, found = level + 1, index >> 1, node_hash(self.hashes.pop(), found)
            done.append((level, index, found))
        self.hashes.append(found)
        self.size += 1
        return done

    def root(self) -> bytes:
        """Root of the tree as it is now, 32 bytes."""
        return _fold(self.hashes) if self.hashes else EMPTY_ROOT


def _fold(roots: Sequence[bytes]) -> bytes:
    found = roots[-1]
    for left in reversed(roots[:-1]):
        found = node_hash(left, found)
    return found


def root_from_leaves(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes in order."""
    tree = CompactRange()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def _subtree(node: NodeReader, start: int, stop: int) -> bytes:
    """Root over the leaves start … stop-1, where `start` is a multiple of the range's next power of two."""
    roots = []
    while start < stop:
        level = (stop - start).bit_length() - 1
        roots.append(node(level, start >> level))
        start += 1 << level
    return _fold(roots)


def tree_root(node: NodeReader, size: int) -> bytes:
    """Root of the first `size` leaves."""
    return _subtree(node, 0, size) if size else EMPTY_ROOT


def _split(size: int) -> int:
    """Largest power of two below `size` (RFC 6962: k)."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_path(node: NodeReader, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]), lowest sibling first; raises ValueError outside 0 ≤ index < size."""
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
    """PROOF(old, D[new]) (RFC 6962 §2.1.2); empty for old = 0 or old = new."""
    if not 0 <= old <= new <= MAX_SIZE:
        raise ValueError(f"a tree of {new} does not extend one of {old}")
    if old in (0, new):
        return []
    # SUBPROOF(m, D[start:stop], b): old counts from `start`; `whole` is b, true while the old root itself is
    # known
    path, start, stop, whole = [], 0, new, True
    while old != stop - start:
        middle = start + _split(stop - start)
        if old <= middle - start:
            path.append(_subtree(node, middle, stop))
            stop = middle
        else:
            path.append(_subtree(node, start, middle))
            old -= middle - start
            start, whole = middle, False
    if not whole:
        path.append(_subtree(node, start, stop))
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether `path` proves that `leaf` (a leaf's hash) is number `index` of the tree (size, root): RFC 9162
    §2.1.3.2.
    """
    if not 0 <= index < size <= MAX_SIZE or len(path) > MAX_PROOF or any(len(p) != 32 for p in path):
        return False
    number, last, found = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if number & 1 or number == last:
            found = node_hash(sibling, found)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        number, last = number >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Whether `path` proves that the tree (new, new_root) extends (old, old_root): RFC 9162 §2.1.4.2."""
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
