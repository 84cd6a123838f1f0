from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.tasks.text.tokenisation import TokenLayout
from mtlsign.tasks.text.vocabulary import build_vocabulary
from tests.unit.tasks.text.layouts import write_glove

LAYOUT = TokenLayout("spaces", 4, keep="first")
TEXTS = ("film film unlisted", "Bad good bad film", "unlisted unlisted unlisted unlisted")


def test_build_vocabulary_orders_words_of_glove_by_frequency(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(TEXTS, LAYOUT, write_glove(tmp_path), None)
    assert vocabulary.words == ("film", "bad", "good") and len(vocabulary) == 5
    vectors = vocabulary.vectors
    assert vectors.dtype == torch.float32 and vectors.shape == (5, 50)
    assert not vectors[0].any() and torch.allclose(vectors[1], vectors[2:].mean(0))
    assert vectors[3, 0] != vectors[4, 0]


def test_build_vocabulary_keeps_at_most_max_words(tmp_path: Path) -> None:
    assert build_vocabulary(TEXTS, LAYOUT, write_glove(tmp_path), 2).words == ("film", "bad")


def test_build_vocabulary_without_common_word_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no word of the texts"):
        build_vocabulary(("unlisted",), LAYOUT, write_glove(tmp_path), None)
