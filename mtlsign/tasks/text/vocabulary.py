"""Vocabulary of a task: frequent words that have a vector, and the matrix of their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtlsign.tasks.text.glove import DIMENSIONS, read_glove
from mtlsign.tasks.text.tokenisation import PADDING, UNKNOWN, TokenLayout, words_by_frequency


@dataclass(frozen=True)
class Vocabulary:
    """Words with their vectors.

    Attributes:
        words: the words of the ids from 2, the most frequent first.
        vectors: float32 [2 + words, 50]; zeros for padding, the mean vector for unknown words.
    """

    words: tuple[str, ...]
    vectors: Tensor

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self.vectors)


def build_vocabulary(
    texts: Sequence[str], layout: TokenLayout, glove: Path, max_words: int | None
) -> Vocabulary:
    """Return the most frequent words of texts that GloVe has.

    Args:
        texts: the training part.
        layout: division into words.
        glove: text file of GloVe.
        max_words: largest number of words; None for all.

    Raises:
        DataError: the file is damaged, or has none of the words.
    """
    frequent = words_by_frequency(texts, layout)
    vectors = read_glove(glove, frequent)
    words = tuple(word for word in frequent if word in vectors)[:max_words]
    matrix = np.zeros((2 + len(words), DIMENSIONS), dtype=np.float32)
    matrix[2:] = [vectors[word] for word in words]
    matrix[UNKNOWN] = matrix[2:].mean(axis=0, dtype=np.float64)
    assert not matrix[PADDING].any()
    return Vocabulary(words, torch.from_numpy(matrix))
