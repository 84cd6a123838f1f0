"""Numbers of a transformer's blocks: those of a suspect with inserted, removed or exchanged blocks.

A block whose output matrices are zero changes nothing, and moves the numbers of all later blocks. Blocks are
found again by their attention heads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.attention_layers import AttentionLayer
from mtlsign.models.families import translation_of
from mtlsign.models.tensor_names import MAX_MAPPINGS
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices, best_assignment

_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
#: Largest ratio of a suspect's blocks to those of W0.
_MAX_GROWTH = 4


@dataclass(frozen=True)
class BlockNames:
    """Names of an architecture's blocks, such as `blocks.0` to `blocks.5`.

    Attributes:
        prefix: text before the number.
        count: number of blocks.
        outputs: texts after the number in the names of the attention layers' output matrices.
    """

    prefix: str
    count: int
    outputs: frozenset[str]

    @classmethod
    def of(cls, attentions: Sequence[AttentionLayer]) -> BlockNames | None:
        """Return the names of blocks with one attention layer each; None if they are not numbered from 0.

        Args:
            attentions: attention layers of the blocks, in execution order.
        """
        splits = [numbered_parts(layer.output) for layer in attentions]
        for depth in range(min(map(len, splits), default=0)):
            parts = [split[-1 - depth] for split in splits]
            numbers = [number for _, number, _ in parts]
            if len({prefix for prefix, _, _ in parts}) == 1 and numbers == list(range(len(parts))):
                return cls(parts[0][0], len(parts), frozenset(rest for _, _, rest in parts))
        return None


@dataclass(frozen=True)
class BlockGroup:
    """Blocks in one place of a file.

    Attributes:
        prefix: text before their numbers.
        place: text before all names of the network, such as `model.`.
        numbers: in ascending order.
    """

    prefix: str
    place: str
    numbers: tuple[int, ...]


class RenumberedTensors(Mapping[str, Tensor]):
    """Tensors of one place of a file with other numbers of blocks; blocks without a new one are left out.

    Args:
        tensors: of the file.
        group: blocks whose numbers change.
        numbers: number in the file -> new number.
    """

    def __init__(self, tensors: Mapping[str, Tensor], group: BlockGroup, numbers: Mapping[int, int]) -> None:
        self._tensors = tensors
        self._sources: dict[str, str] = {}
        prefix = group.prefix
        for name in tensors:
            if not isinstance(name, str) or not name.startswith(group.place):
                continue
            parts = [part for part in numbered_parts(name) if part[0] == prefix]
            if not parts:
                self._sources[name] = name
                continue
            _, number, rest = parts[0]
            if number in numbers:
                self._sources[f"{prefix}.{numbers[number]}.{rest}"] = name

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor of the file by its new name."""
        return self._tensors[self._sources[name]]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the new names."""
        return iter(self._sources)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._sources)


def block_groups(
    tensors: Mapping[str, Tensor], blocks: BlockNames, *, own_numbers: bool = False
) -> list[BlockGroup]:
    """Return the blocks of a file that have other numbers than W0's, or those that have just W0's.

    Args:
        tensors: of the file.
        blocks: names of the architecture's blocks.
        own_numbers: whether the numbers are just those from 0 to count - 1.

    Returns:
        Numbers of the blocks that have an output matrix, under these names or other libraries' names of
        them. Without `own_numbers`, groups are absent if they have less than half or over four times as many.

    Raises:
        ModelError: there are more than `MAX_MAPPINGS` groups.
    """
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in tensors:
        parts = numbered_parts(name) if isinstance(name, str) else []
        if not parts:
            continue
        translation = translation_of(name)
        own = name if translation is None else translation.target
        for (prefix, number, rest), output in product(parts, blocks.outputs):
            if translation is None and rest != output:
                continue
            tail = f"{blocks.prefix}.{number}.{output}"
            if own == tail or own.endswith(f".{tail}"):
                numbers[prefix, own.removesuffix(tail)].add(number)
    count = blocks.count
    groups = [
        BlockGroup(prefix, place, tuple(sorted(group)))
        for (prefix, place), group in sorted(numbers.items())
        if (group == set(range(count))) == own_numbers
        and count <= 2 * len(group)
        and len(group) <= _MAX_GROWTH * count
    ]
    if len(groups) > MAX_MAPPINGS:
        raise too_many_places()
    return groups


def too_many_places() -> ModelError:
    """Return the error for blocks with other numbers in more than `MAX_MAPPINGS` places."""
    return ModelError(
        f"The blocks exist in over {MAX_MAPPINGS} places of the file. Keep one of them.", field="checkpoint"
    )


def numbered_parts(name: str) -> list[tuple[str, int, str]]:
    """Return text before, number and text after each number of up to four digits between dots."""
    words = name.split(".")
    return [
        (".".join(words[:place]), int(word), ".".join(words[place + 1 :]))
        for place, word in enumerate(words[1:-1], 1)
        if _NUMBER.fullmatch(word)
    ]


def windows(numbers: Sequence[int], count: int) -> Iterator[dict[int, int]]:
    """Yield numbers in the file -> numbers from 0 to count - 1, so that each number is in one window."""
    for start in range(0, len(numbers), count):
        yield {number: place for place, number in enumerate(numbers[start : start + count])}


def new_numbers(similarities: Floats, numbers: Sequence[int]) -> dict[int, int]:
    """Return number in the file -> number of W0's block, for the most similar blocks.

    Args:
        similarities: [W0's blocks, blocks of the file].
        numbers: the numbers in the file.
    """
    order: Indices = best_assignment(similarities)
    return {numbers[column]: block for block, column in enumerate(order.tolist()) if column >= 0}
