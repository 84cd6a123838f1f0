"""Texts with classes: one part of a data set."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.errors import DataError


@dataclass(frozen=True)
class LabelledTexts:
    """Part of a data set.

    Attributes:
        texts: the texts.
        labels: int64 [n], the class of each text.
    """

    texts: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def selected(self, rows: Tensor) -> LabelledTexts:
        """Return the texts of some rows (int64), in their order."""
        return LabelledTexts(tuple(self.texts[row] for row in rows.tolist()), self.labels[rows])


def require_complete(part: LabelledTexts, source: str, classes: int, official_count: int) -> None:
    """Check the number of texts and that every class has texts. A smaller part than the official is allowed.

    Args:
        part: the texts.
        source: file or folder of the part, for messages.
        classes: number of classes.
        official_count: number of texts in the official part.

    Raises:
        DataError: a class is missing, or there are more texts than in the official part.
    """
    missing = sorted(set(range(classes)) - set(torch.unique(part.labels).tolist()))
    if missing:
        raise DataError(
            f"{source} has no text of class {missing[0]}. Put complete files there.", field="data"
        )
    if len(part) > official_count:
        raise DataError(
            f"{source} has {len(part):,} texts, more than the official {official_count:,}. Put the official "
            "files there.",
            field="data",
        )
    if len(part) < official_count:
        warnings.warn(
            f"{source} has {len(part):,} of the official {official_count:,} texts. Mention this with every "
            "result.",
            stacklevel=2,
        )
