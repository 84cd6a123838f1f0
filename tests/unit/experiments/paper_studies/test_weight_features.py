from __future__ import annotations

import pytest
import torch

from mtlsign.experiments.paper_studies.weight_features import QUANTILES, separation, weight_features

PER_TENSOR = 4 + len(QUANTILES)


def networks(count: int, *, scale: float, seed: int) -> list[list[float]]:
    """Features of random tensors of a given spread."""
    generator = torch.Generator().manual_seed(seed)
    return [
        weight_features({str(i): scale * torch.randn(400, generator=generator) for i in range(10)})
        for _ in range(count)
    ]


def test_features_depend_neither_on_order_of_values_nor_of_tensors() -> None:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    tensors = {"a": values, "b": torch.arange(4.0), "counter": torch.tensor(3), "one": torch.ones(1)}
    features = weight_features(tensors)
    assert len(features) == 2 * PER_TENSOR
    permuted = {"b": torch.arange(4.0), "a": values.flip(0, 1), "counter": torch.tensor(9)}
    assert weight_features(permuted) == pytest.approx(features)
    assert features[0] == pytest.approx(float(values.mean()))
    assert features[1] == pytest.approx(float(values.std().log()))
    assert features[4] == pytest.approx(float((values.min() - values.mean()) / values.std()))


def test_separation_of_different_groups_is_complete_and_interval_is_exact() -> None:
    value = separation(networks(20, scale=1.0, seed=1), networks(20, scale=3.0, seed=2))
    assert (value.correct, value.n, value.accuracy, value.high) == (40, 40, 1.0, 1.0)
    assert value.low == pytest.approx(0.025 ** (1 / 40))


def test_separation_of_equal_groups_is_near_one_half() -> None:
    value = separation(networks(40, scale=1.0, seed=1), networks(40, scale=1.0, seed=2))
    assert value.low < 0.5 < value.high


def test_separation_needs_two_networks_in_each_group() -> None:
    with pytest.raises(ValueError, match="at least two networks"):
        separation(networks(1, scale=1.0, seed=1), networks(5, scale=1.0, seed=2))
