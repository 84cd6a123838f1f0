from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.errors import DataError
from mtlsign.tasks.splitting import seeded_generator, split_training_rows, stratified_permutation


@pytest.mark.parametrize("labels", [100, torch.arange(100) % 5])
def test_split_training_rows_gives_disjoint_parts_of_fixed_sizes(labels: Tensor | int) -> None:
    rows = split_training_rows(labels, 3)
    assert {name: len(part) for name, part in rows.items()} == {
        "validation": 5,
        "attacker": 10,
        "train": 85,
        "inner": 8,
    }
    together = torch.cat([rows[name] for name in ("validation", "attacker", "train")])
    assert torch.equal(together.sort().values, torch.arange(100))
    assert set(rows["inner"].tolist()) < set(rows["train"].tolist())
    second, other = split_training_rows(labels, 3), split_training_rows(labels, 4)
    assert all(torch.equal(rows[name], second[name]) for name in rows)
    assert not torch.equal(rows["attacker"], other["attacker"])


def test_stratified_permutation_keeps_class_proportions() -> None:
    labels = torch.tensor([0] * 80 + [1] * 20)
    order = stratified_permutation(labels, seeded_generator(1))
    for start in range(0, 100, 20):
        assert 3 <= int(labels[order[start : start + 20]].sum()) <= 5


def test_split_training_rows_of_few_samples_raises_data_error() -> None:
    with pytest.raises(DataError, match="too few"):
        split_training_rows(3, 0)
