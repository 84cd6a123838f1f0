from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.errors import DataError
from mtlsign.tasks.text.glove import read_glove
from tests.unit.tasks.text.layouts import vector_line, write_glove


def test_read_glove_returns_requested_words_in_order_of_file(tmp_path: Path) -> None:
    path = write_glove(tmp_path)
    vectors = read_glove(path, ["film", "bad", "absent"])
    assert list(vectors) == ["bad", "film"]
    assert vectors["bad"].dtype == np.float32 and vectors["bad"].shape == (50,)
    assert np.allclose(vectors["bad"], [float(text) for text in vector_line("bad", 1).split(" ")[1:]])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=50, max_size=50))
def test_read_glove_returns_written_numbers(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "glove.txt"
    path.write_text("word " + " ".join(map(str, numbers)) + "\n", "utf-8")
    assert read_glove(path, ["word"])["word"].tolist() == numbers


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=60) | st.text("0123456789.e- \nw", max_size=200).map(str.encode))
def test_read_glove_of_any_bytes_raises_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_glove(path, ["word"])
    assert caught.value.field == "data"


NUMBERS = vector_line("", 3).strip()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"{NUMBERS}", "no word with 50 numbers in line 2"),
        (f" {NUMBERS}", "no word with 50 numbers in line 2"),
        (f"good {NUMBERS} 0.5", "no word with 50 numbers in line 2"),
        (f"other {NUMBERS[:200]}", "no word with 50 numbers in line 2"),
        ("", "no word with 50 numbers in line 2"),
        ("good " + NUMBERS.replace(" ", " x", 1), "wrong number in line 2"),
        (f"good {' '.join(['nan'] * 50)}", "out of range in line 2"),
        (f"good {' '.join(['inf'] * 50)}", "out of range in line 2"),
        (f"good {' '.join(['1e300'] * 50)}", "out of range in line 2"),
        (f"the {NUMBERS}", "repeats a word in line 2"),
        ("x" * 5000, "more than 4,096 bytes in line 2"),
    ],
)
def test_read_glove_of_wrong_line_raises_data_error(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "glove.txt"
    path.write_text(f"{vector_line('the')}\n{line}\n", "utf-8")
    with pytest.raises(DataError, match=problem) as caught:
        read_glove(path, ["the", "good"])
    assert str(path) in str(caught.value)


def test_read_glove_of_other_encoding_raises_data_error(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_bytes(vector_line("été").encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text in line 1"):
        read_glove(path, ["the"])


def test_read_glove_without_requested_word_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no word of the texts"):
        read_glove(write_glove(tmp_path), ["absent"])
    assert not math.isnan(read_glove(write_glove(tmp_path), ["the"])["the"].sum())
