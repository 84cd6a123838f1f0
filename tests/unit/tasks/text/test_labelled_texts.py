from __future__ import annotations

import warnings

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.tasks.text.labelled_texts import LabelledTexts, require_complete

PART = LabelledTexts(("a", "b", "c"), torch.tensor([0, 1, 0]))


def test_selected_keeps_order_of_rows() -> None:
    chosen = PART.selected(torch.tensor([2, 1]))
    assert chosen.texts == ("c", "b") and chosen.labels.tolist() == [0, 1] and len(chosen) == 2


def test_require_complete_accepts_official_part_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_complete(PART, "train", 2, 3)


def test_require_complete_of_smaller_part_warns() -> None:
    with pytest.warns(UserWarning, match="3 of the official 4 texts"):
        require_complete(PART, "train", 2, 4)


@pytest.mark.parametrize(
    ("classes", "official", "problem"), [(3, 3, "no text of class 2"), (2, 2, "more than")]
)
def test_require_complete_of_wrong_part_raises_data_error(classes: int, official: int, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        require_complete(PART, "train", classes, official)


def test_require_complete_of_empty_part_raises_data_error() -> None:
    with pytest.raises(DataError, match="no text of class 0"):
        require_complete(LabelledTexts((), torch.tensor([], dtype=torch.int64)), "train", 2, 3)
