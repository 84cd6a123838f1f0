from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.errors import DataError
from mtlsign.tasks.text import imdb
from mtlsign.tasks.text.imdb import read_imdb
from tests.unit.tasks.text.layouts import write_imdb

pytestmark = pytest.mark.filterwarnings("ignore:.*of the official")


def test_read_imdb_returns_reviews_without_line_breaks(tmp_path: Path) -> None:
    write_imdb(tmp_path)
    parts = read_imdb(tmp_path)
    assert {part: len(texts) for part, texts in parts.items()} == {"train": 40, "test": 12}
    assert parts["test"].labels.tolist() == [0] * 6 + [1] * 6
    assert parts["test"].texts[0] == "It isn't  a bad Movie0."


def test_read_imdb_ignores_other_files(tmp_path: Path) -> None:
    folder = write_imdb(tmp_path)
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_bytes(b"\xff")
    (folder / "train" / "pos" / ".DS_Store").write_bytes(b"\xff")
    assert len(read_imdb(tmp_path)["train"]) == 40


def test_read_imdb_without_folder_names_it(tmp_path: Path) -> None:
    folder = write_imdb(tmp_path)
    (folder / "test" / "pos").rename(folder / "test" / "positive")
    with pytest.raises(
        DataError, match=r"imdb is incomplete: aclImdb/test/pos missing in .*aclImdb_v1.tar.gz"
    ):
        read_imdb(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe", "no UTF-8"),
        (b"a" * 70_000, "more than 65,536 bytes"),
        (b"", "is empty"),
        (b" <br />\n<BR/>", "is empty"),
    ],
)
def test_read_imdb_of_wrong_review_raises_data_error(tmp_path: Path, content: bytes, problem: str) -> None:
    path = write_imdb(tmp_path) / "train" / "neg" / "3_2.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_imdb(tmp_path)
    assert caught.value.field == "data" and str(path) in str(caught.value)


def test_read_imdb_of_folder_with_name_of_review_raises_data_error(tmp_path: Path) -> None:
    (write_imdb(tmp_path) / "train" / "neg" / "99_1.txt").mkdir()
    with pytest.raises(DataError, match="is no file"):
        read_imdb(tmp_path)


def test_read_imdb_with_empty_class_raises_data_error(tmp_path: Path) -> None:
    folder = write_imdb(tmp_path)
    for path in (folder / "test" / "pos").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no text of class 1"):
        read_imdb(tmp_path)


def test_read_imdb_with_too_many_reviews_raises_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imdb(tmp_path)
    monkeypatch.setattr(imdb, "OFFICIAL_COUNT", 10)
    with pytest.raises(DataError, match="more than 10 reviews"):
        read_imdb(tmp_path)
