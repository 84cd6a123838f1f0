"""Checked reading of text files: sizes, lines, encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mtlsign.errors import DataError


def damaged_file(path: Path, problem: str) -> DataError:
    """Return the error for a file whose content is wrong; `problem` is a clause about the file."""
    return DataError(f"{path} {problem}. Put the official file there.", field="data")


def require_present(name: str, root: Path, paths: Sequence[str], archive: str, folder: str = "") -> None:
    """Raise `DataError` if files or folders of a data set are missing.

    Args:
        name: the data set.
        root: data root.
        paths: files and folders below the root.
        archive: file name of the official archive.
        folder: folder below the root in which the archive is unpacked; empty for the root.
    """
    missing = [path for path in paths if not (root / path).exists()]
    if missing:
        raise DataError(
            f"{name} is incomplete: {', '.join(missing)} missing in {root}. Unpack {archive} in "
            f"{root / folder}, or give another folder with --data.",
            field="data",
        )


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a small UTF-8 file.

    Raises:
        DataError: the file cannot be read, is too large or is no UTF-8.
    """
    if not path.is_file():
        raise damaged_file(path, "is no file")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise damaged_file(path, f"has more than {max_bytes:,} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged_file(path, "is no UTF-8 text") from None
    except OSError as error:
        raise damaged_file(path, f"cannot be read ({error.strerror})") from None


def read_lines(path: Path, *, max_lines: int, max_line_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers from 1, without their ends.

    Args:
        path: the file.
        max_lines: largest number of lines.
        max_line_bytes: longest line in bytes, with its end.

    Raises:
        DataError: the file cannot be read, exceeds a limit or is no UTF-8.
    """
    if not path.is_file():
        raise damaged_file(path, "is no file")
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(max_line_bytes + 1):
                number += 1
                if number > max_lines:
                    raise damaged_file(path, f"has more than {max_lines:,} lines")
                if len(line) > max_line_bytes:
                    raise damaged_file(path, f"has more than {max_line_bytes:,} bytes in line {number}")
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise damaged_file(path, f"has no UTF-8 text in line {number}") from None
    except OSError as error:
        raise damaged_file(path, f"cannot be read ({error.strerror})") from None
