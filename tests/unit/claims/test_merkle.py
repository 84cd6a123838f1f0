"""RFC 6962 trees: known vectors, all proofs of small trees, and refusals."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.claims import merkle

#: Leaves and roots of the certificate-transparency reference implementation's tests.
LEAVES = [bytes.fromhex(x) for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                                     "606162636465666768696a6b6c6d6e6f")]  # fmt: skip
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def grow(count: int) -> tuple[list[bytes], dict[tuple[int, int], bytes], list[bytes]]:
    """Return leaf hashes, complete nodes, and the root after each leaf."""
    tree, nodes, roots = merkle.CompactRange(), {}, [merkle.EMPTY_ROOT]
    leaves = [merkle.leaf_hash(b"%d" % i) for i in range(count)]
    for leaf in leaves:
        nodes.update({(level, i): h for level, i, h in tree.append(leaf)})
        roots.append(tree.root())
    return leaves, nodes, roots


def slow_root(leaves: list[bytes]) -> bytes:
    """Return MTH as defined by RFC 6962."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256().digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return merkle.node_hash(slow_root(leaves[:k]), slow_root(leaves[k:]))


def test_compact_range_of_known_leaves_has_known_roots() -> None:
    tree = merkle.CompactRange()
    for leaf, root in zip(LEAVES, ROOTS, strict=True):
        tree.append(merkle.leaf_hash(leaf))
        assert tree.root().hex() == root
    assert (
        merkle.root_from_leaves([]).hex()
        == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_proofs_of_small_trees_are_valid_only_for_their_leaf_and_size() -> None:
    leaves, nodes, roots = grow(34)
    node = lambda level, i: nodes[level, i]  # noqa: E731
    for size in range(35):
        assert merkle.tree_root(node, size) == roots[size] == slow_root(leaves[:size])
        for i in range(size):
            path = merkle.inclusion_path(node, i, size)
            assert merkle.verify_inclusion(leaves[i], i, size, path, roots[size])
            for j in range(size):
                assert merkle.verify_inclusion(leaves[i], j, size, path, roots[size]) == (i == j)
            assert not merkle.verify_inclusion(leaves[i], i, size, [*path, bytes(32)], roots[size])
            assert not path or not merkle.verify_inclusion(leaves[i], i, size, path[:-1], roots[size])
        for old in range(size + 1):
            path = merkle.consistency_path(node, old, size)
            assert merkle.verify_consistency(old, roots[old], size, roots[size], path)
            assert not merkle.verify_consistency(old, roots[old], size, roots[size], [*path, bytes(32)])
            if 0 < old < size:
                assert not merkle.verify_consistency(old, roots[old - 1], size, roots[size], path)
                assert not merkle.verify_consistency(old, roots[old], size, roots[old], path)
                assert not merkle.verify_consistency(old, roots[old], size, roots[size], path[1:])


@given(st.data())
def test_proof_with_flipped_bit_is_invalid(data: st.DataObject) -> None:
    leaves, nodes, roots = grow(29)
    node = lambda level, i: nodes[level, i]  # noqa: E731
    size = data.draw(st.integers(2, 29))
    i, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    for path, check in (
        (
            merkle.inclusion_path(node, i, size),
            lambda p: merkle.verify_inclusion(leaves[i], i, size, p, roots[size]),
        ),
        (
            merkle.consistency_path(node, old, size),
            lambda p: merkle.verify_consistency(old, roots[old], size, roots[size], p),
        ),
    ):
        bit = data.draw(st.integers(0, 256 * len(path) - 1))
        flipped = [bytearray(p) for p in path]
        flipped[bit // 256][bit % 256 // 8] ^= 1 << bit % 8
        assert check(path) and not check([bytes(p) for p in flipped])


def test_merkle_functions_with_invalid_arguments_raise() -> None:
    for size, hashes in ((1, []), (3, [bytes(32)]), (1, [b"short"]), (-1, [])):
        with pytest.raises(ValueError):
            merkle.CompactRange(size, hashes)
    with pytest.raises(ValueError):
        merkle.inclusion_path(lambda _level, _i: bytes(32), 3, 3)
    with pytest.raises(ValueError):
        merkle.consistency_path(lambda _level, _i: bytes(32), 4, 3)
    assert not merkle.verify_inclusion(bytes(32), 0, 1, [bytes(31)], bytes(32))
