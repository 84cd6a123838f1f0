from __future__ import annotations

import torch

from mtlsign.tasks import Batch


def test_batch_unpacks_and_counts_samples() -> None:
    inputs, targets = torch.rand(3, 1, 2, 2), torch.arange(3)
    batch = Batch(inputs, targets)
    x, y = batch
    assert x is inputs and y is targets and len(batch) == 3


def test_batch_moves_nested_tensors_to_device() -> None:
    tokens = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "mask": torch.ones(2, 5)}
    boxes = [{"boxes": torch.ones(1, 4), "name": "a"}, {"boxes": torch.ones(3, 4), "name": "b"}]
    batch = Batch(tokens, boxes).to("meta")
    assert len(Batch(tokens, boxes)) == 2
    assert batch.inputs["mask"].is_meta and batch.targets[1]["boxes"].is_meta
    assert batch.targets[1]["name"] == "b" and not tokens["mask"].is_meta
