from __future__ import annotations

import torch

from mtlsign.tasks import load_task
from tests.unit.tasks.synthetic import joined


def test_load_digits_fixes_test_split_for_all_seeds() -> None:
    t = load_task("digits", seed=1)
    assert (t.input_spec.channels, t.input_spec.height, t.input_spec.width, t.classes) == (1, 32, 32, 10)
    assert t.size("test") == 359 and t.size("train") == 1222
    assert torch.bincount(t.splits["test"].batch(torch.arange(359)).targets).min() >= 34
    x, _ = joined(list(t.batches("train", 500, shuffle=False)))
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1
    other = load_task("digits", seed=2)
    rows = torch.arange(359)
    assert torch.equal(t.splits["test"].batch(rows).inputs, other.splits["test"].batch(rows).inputs)
    assert not torch.equal(t.batch_at("attacker", 9, 0).inputs, other.batch_at("attacker", 9, 0).inputs)
