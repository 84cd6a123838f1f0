from __future__ import annotations

import torch

from mtlsign.tasks.text.text_split import TextSplit

TOKENS = torch.arange(2, 26).reshape(6, 4)
SPLIT = TextSplit(TOKENS, torch.arange(6) % 3, torch.tensor([5, 0, 3, 2]))


def test_text_split_returns_rows_by_index() -> None:
    inputs, targets = SPLIT.batch(torch.tensor([3, 0]))
    assert len(SPLIT) == 4 and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, TOKENS[[2, 5]]) and targets.tolist() == [2, 2]


def test_text_split_parts_of_a_batch_concatenate_to_the_batch() -> None:
    indices = torch.tensor([1, 3, 0, 2])
    whole = SPLIT.batch(indices, torch.Generator().manual_seed(0))
    parts = [SPLIT.batch(indices, part=slice(start, start + 2)) for start in (0, 2)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_text_split_on_its_device_is_itself() -> None:
    assert SPLIT.to("cpu") is SPLIT
    moved = SPLIT.to("meta")
    assert moved.batch(torch.tensor([0])).inputs.is_meta and moved.rows.device.type == "cpu"
