from __future__ import annotations

from pathlib import Path

import pytest

from mtlsign.errors import DataError
from mtlsign.tasks.text.text_files import read_lines, read_text, require_present


def test_read_text_returns_text_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("été", "utf-8")
    assert read_text(path, 5) == "été"
    with pytest.raises(DataError, match="more than 4 bytes") as caught:
        read_text(path, 4)
    assert caught.value.field == "data" and str(path) in str(caught.value)


def test_read_text_of_other_encoding_or_no_file_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8"):
        read_text(tmp_path / "latin.txt", 100)
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(DataError, match="is no file"):
            read_text(path, 100)


def test_read_lines_numbers_lines_and_removes_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\ntwo \xc2\xa0")
    assert list(read_lines(path, max_lines=3, max_line_bytes=9)) == [(1, "one"), (2, ""), (3, "two \xa0")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\nb\nc\nd\n", "more than 3 lines"),
        (b"a\n" + b"x" * 100, "more than 9 bytes in line 2"),
        (b"a\n\xff\n", "no UTF-8 text in line 2"),
    ],
)
def test_read_lines_beyond_limits_raise_data_error(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list(read_lines(path, max_lines=3, max_line_bytes=9))


def test_read_lines_without_file_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file"):
        list(read_lines(tmp_path, max_lines=3, max_line_bytes=9))


def test_require_present_names_missing_files_and_archive(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    require_present("sst5", tmp_path, ["a"], "a.zip")
    with pytest.raises(DataError, match=r"sst5 is incomplete: b, c missing in .* Unpack a\.zip .*SST, or"):
        require_present("sst5", tmp_path, ["a", "b", "c"], "a.zip", "SST")
