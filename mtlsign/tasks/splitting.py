"""Division of the training data into splits, fixed by a seed."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

from mtlsign.errors import DataError

#: `inner` is D', a tenth of train inside it (paper, section 4.1). Embedding never reads `attacker`.
SPLITS = ("train", "inner", "validation", "attacker", "test")
VALIDATION, ATTACKER, INNER = 0.05, 0.10, 0.10


def seeded_generator(*parts: object) -> Generator:
    """Return a CPU generator seeded with SHA-256 of `parts`, independent of torch's global generator."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def stratified_permutation(labels: Tensor | int, gen: Generator) -> Tensor:
    """Return a random order of the samples in which every section holds the classes in proportion.

    Args:
        labels: int64 [n], or the number n of samples without classes.
        gen: CPU generator.

    Returns:
        int64 [n].
    """
    if isinstance(labels, int):
        return torch.randperm(labels, generator=gen)
    order = torch.randperm(len(labels), generator=gen)
    shuffled = labels[order]
    position = torch.empty(len(labels), dtype=torch.float64)
    for value in torch.unique(shuffled):
        rows = torch.nonzero(shuffled == value).flatten()
        offset = torch.rand(1, generator=gen, dtype=torch.float64)
        position[rows] = (torch.arange(len(rows), dtype=torch.float64) + offset) / len(rows)
    return order[torch.argsort(position, stable=True)]


def share_of_rows(name: str, labels: Tensor, share: float) -> Tensor:
    """Return the rows of a share of a data set, with the classes in proportion, and at least 10.

    Args:
        name: the data set, which fixes the choice.
        labels: int64 [n].
        share: part of the rows, 0 to 1.

    Returns:
        int64 [m].
    """
    rows = stratified_permutation(labels, seeded_generator("mtlsign/share", name))
    return rows[: max(10, round(share * len(labels)))]


def split_training_rows(
    labels: Tensor | int, seed: int, present: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Divide the official training part into train, inner, validation and attacker.

    Args:
        labels: int64 [n], or the number n of samples without classes.
        seed: fixes the division.
        present: splits with data of another source; they take no rows.

    Returns:
        Rows (int64) by split: validation 5 %, attacker 10 %, train the rest; inner is 10 % of train.

    Raises:
        DataError: a split would be empty.
    """
    order = stratified_permutation(labels, seeded_generator("mtlsign/splits", seed))
    count, start = len(order), 0
    rows: dict[str, Tensor] = {}
    for name, fraction in (("validation", VALIDATION), ("attacker", ATTACKER)):
        if name not in present:
            size = max(1, round(fraction * count))
            rows[name] = order[start : start + size]
            start += size
    rows["train"] = order[start:]
    if "inner" not in present:
        rows["inner"] = rows["train"][: max(1, round(INNER * (count - start)))]
    if count - start < 2:
        raise DataError(f"{count} training samples are too few to split. Give at least 10.", field="task")
    return rows
