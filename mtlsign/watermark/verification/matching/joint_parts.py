"""Parts of joint matrices of queries, keys and values, as candidates of a search.

A matrix holds all queries, keys and values in any order, or those of each group of heads after each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.transformer import HeadProducts
from mtlsign.watermark.verification.matching.head_comparison import head_targets, similarities


@dataclass(frozen=True)
class JointPart(FileTensor):
    """A part of a joint matrix; its place is that of no other tensor.

    Attributes:
        source: the joint matrix.
        blocks: 1, or the number of groups of heads that follow each other.
        start: first unit of the part in each block.
        length: units of the part in each block.
    """

    source: FileTensor
    blocks: int
    start: int
    length: int


def are_disjoint(*parts: JointPart) -> bool:
    """Return whether parts of one joint matrix are in the same blocks and share no rows."""
    spans = sorted((part.start, part.start + part.length) for part in parts)
    follow = all(end <= start for (_, end), (start, _) in pairwise(spans))
    return follow and len({part.blocks for part in parts}) == 1


def parts_of_joint(source: FileTensor, length: int, group: int, size: int) -> Iterator[JointPart]:
    """Yield the parts of a joint matrix that queries, keys or values can be.

    Args:
        source: [(group + 2) * heads of keys * size, columns]; of other matrices there are none.
        length: heads of the part for each head of keys: `group` or 1.
        group: heads of queries for each head of keys.
        size: rows of a head.
    """
    units = group + 2
    kv_heads, rest = divmod(len(source.values), units * size)
    if source.values.dim() != 2 or rest or not kv_heads:
        return
    for blocks in dict.fromkeys((1, kv_heads)):
        view = source.values.unflatten(0, (blocks, units, kv_heads * size // blocks))
        for start in sorted({0, 1, 2, units - 2, units - 1}):
            if start + length <= units:
                part = view[:, start : start + length].flatten(0, 2)
                number = ((2 * source.place + (blocks > 1)) * units + start) * (units + 1) + length
                yield JointPart(source.name, -1 - number, part, (part,), source, blocks, start, length)


def similarity_of_heads(left: Floats, right: Floats, heads: HeadProducts, rows: Indices) -> float:
    """Return the mean over a suspect's heads of the largest cosine with a head of W0.

    Args:
        left: chosen rows of the products' first matrix, [heads, rows, head size].
        right: sketches of the products' second matrix, [kv_heads, head size, s].
        heads: of W0.
        rows: the chosen ones.
    """
    repeated = np.repeat(right, len(left) // len(right), axis=0)
    return float(similarities(np.matmul(left, repeated), [head_targets(heads, rows)]).mean())
