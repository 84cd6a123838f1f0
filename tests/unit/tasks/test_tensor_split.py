from __future__ import annotations

import torch

from mtlsign.tasks.tensor_split import crop_and_flip
from tests.unit.tasks.synthetic import task


def test_tensor_split_normalises_and_augments() -> None:
    t = task()
    x, _ = t.splits["train"].batch(torch.arange(3))
    raw = t.splits["train"].x[t.splits["train"].rows[:3]]  # type: ignore[attr-defined]
    assert x.dtype == torch.float32 and torch.allclose(x, (raw.float() / 255 - 0.5) / 0.5)
    draws = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1], [0.0, 0.999, 0.9]])
    out = crop_and_flip(raw, draws, 2, True)
    assert torch.equal(out[0], raw[0]) and torch.equal(out[1], raw[1].flip(2))
    expected = torch.zeros_like(raw[2])
    expected[:, 2:, :-2] = raw[2][:, :-2, 2:]
    assert torch.equal(out[2], expected)
