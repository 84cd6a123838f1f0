from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.attacks.recurrent_symmetries import random_invertible_matrix
from mtlsign.watermark.verification.vocabulary import MAX_WORDS, VocabularyAxes, find_words


def vocabulary(count: int = 600, size: int = 12) -> Tensor:
    """Return vectors of unequal directions and lengths, as those of words are."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, size, generator=generator, dtype=torch.float64)
    vectors = vectors * (1 + torch.rand(count, 1, generator=generator, dtype=torch.float64).pow(4) * 3)
    return vectors + 0.5 * vectors.square() * torch.linspace(0.2, 1.0, size)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_find_words_in_other_order_and_coordinates(noise: float) -> None:
    vectors, generator = vocabulary(), torch.Generator().manual_seed(1)
    known = VocabularyAxes.of(vectors).coordinates(vectors[:100])
    order = torch.randperm(600, generator=generator)
    changed = vectors + noise * torch.randn(600, 12, generator=generator, dtype=torch.float64)
    changed = (changed @ random_invertible_matrix(12, generator) + 3.0)[order]
    rows = find_words(known, changed)
    assert rows is not None
    right = (order[rows] == torch.arange(100)).float().mean()
    assert right == 1.0 if noise == 0 else right > 0.97


def test_find_words_of_other_dimensions_or_numbers_is_none() -> None:
    vectors = vocabulary()
    known = VocabularyAxes.of(vectors).coordinates(vectors[:100])
    assert find_words(known, vectors[:, :11]) is None
    assert find_words(known, torch.zeros(600, 12)) is None
    assert find_words(known, torch.zeros(MAX_WORDS + 1, 12)) is None


def test_find_words_in_several_blocks() -> None:
    vectors = vocabulary(40_000, 6)
    known = VocabularyAxes.of(vectors).coordinates(vectors[:50])
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(1))
    rows = find_words(known, vectors[order])
    assert rows is not None and torch.equal(order[rows], torch.arange(50))


def test_axes_leave_out_directions_without_variance() -> None:
    vectors = vocabulary()
    wide = torch.cat([vectors, vectors[:, :2] @ torch.ones(2, 2, dtype=torch.float64)], 1)
    assert VocabularyAxes.of(wide).axes.shape == (14, 12)
