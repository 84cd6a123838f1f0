from __future__ import annotations

import pytest
import torch

from benchmarks.paired_drop import paired_drop


def test_paired_drop_counts_samples_on_which_the_networks_disagree() -> None:
    labels = torch.arange(200) % 2
    clean = torch.nn.functional.one_hot(labels, 2).float()
    marked = clean.clone()
    clean[:3] = clean[:3].flip(1)  # W0 is wrong on 3 samples, the marked network on 8 others
    marked[10:18] = marked[10:18].flip(1)
    result = paired_drop(clean, marked, labels)
    assert result["clean"] == pytest.approx(0.985) and result["marked"] == pytest.approx(0.96)
    assert result["drop"] == pytest.approx(2.5) and result["disagreement"] == pytest.approx(11 / 200)
    # variance of differences: 11 of 200 are 1 in size, about the mean of 5 / 200
    assert result["half_width"] == pytest.approx(100 * 1.96 * ((11 - 25 / 200) / 199 / 200) ** 0.5)
    assert result["kl"] == pytest.approx(11 / 200 * (2 * torch.e / (1 + torch.e) - 1))


def test_paired_drop_of_equal_networks_is_zero() -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    result = paired_drop(logits, logits, torch.zeros(50, dtype=torch.int64))
    assert {result[name] for name in ("drop", "half_width", "disagreement", "kl")} == {0.0}
