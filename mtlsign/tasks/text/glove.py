"""Word vectors of GloVe (Pennington et al. 2014): a word and its numbers on each line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtlsign.errors import DataError
from mtlsign.tasks.text.text_files import damaged_file, read_lines

FOLDER = "glove.6B"
FILE = f"{FOLDER}/glove.6B.50d.txt"
ARCHIVE = "glove.6B.zip"
#: Numbers of one vector.
DIMENSIONS = 50
#: The official file has 400,000 words.
_MAX_LINES = 3_000_000
_MAX_LINE_BYTES = 4096
#: Official numbers are below 6.
_LARGEST_NUMBER = 1e3


def read_glove(path: Path, words: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """Return the vectors of the requested words that the file has.

    Args:
        path: text file of GloVe.
        words: the requested words.

    Returns:
        float32 [50] by word, in the order of the file.

    Raises:
        DataError: the file is damaged.
    """
    requested = frozenset(words)
    vectors: dict[str, NDArray[np.float32]] = {}
    for number, line in read_lines(path, max_lines=_MAX_LINES, max_line_bytes=_MAX_LINE_BYTES):
        word, _, numbers = line.partition(" ")
        if not word or numbers.count(" ") != DIMENSIONS - 1:
            raise damaged_file(path, f"has no word with {DIMENSIONS} numbers in line {number}")
        if word in requested:
            if word in vectors:
                raise damaged_file(path, f"repeats a word in line {number}")
            vectors[word] = _parse_vector(path, number, numbers)
    if not vectors:
        raise DataError(f"{path} has no word of the texts. Put the official file there.", field="data")
    return vectors


def _parse_vector(path: Path, line_number: int, numbers: str) -> NDArray[np.float32]:
    try:
        vector = np.array([float(text) for text in numbers.split(" ")])
    except ValueError:
        raise damaged_file(path, f"has a wrong number in line {line_number}") from None
    if not (np.abs(vector) <= _LARGEST_NUMBER).all():  # also false for NaN
        raise damaged_file(path, f"has a number out of range in line {line_number}")
    return vector.astype(np.float32)
