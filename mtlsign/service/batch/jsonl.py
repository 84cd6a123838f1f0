"""Claims and results as files of lines, for bulk work."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mtlsign.errors import ClaimError

MAX_LINE = 128 * 2**20
MAX_CLAIMS = 1_000_000


def read_claims(path: Path) -> list[Any]:
    """The claims of a file, one on each line; a line that is no JSON stays as None, its own problem.

    Raises: ClaimError when the file cannot be read or holds no claim.
    """
    found: list[Any] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE or len(found) >= MAX_CLAIMS:
                    raise ClaimError(
                        f"{path} holds a line or a number of lines over the limit", field="claims"
                    )
                if line.strip():
                    found.append(_parse(line))
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror}; give a file of claims", field="claims") from None
    if not found:
        raise ClaimError(f"{path} holds no claim; write one on each line", field="claims")
    return found


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class ResultWriter:
    """A file of one result on each line, written as they come: `PATH.part` until all are there."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.tally: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Raises ClaimError when the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("w", encoding="utf-8")
        except OSError as error:
            raise ClaimError(f"{self.path}: {error.strerror}; choose another file", field="out") from None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self.part, self.path)

    def add(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Write some more. Raises ClaimError when they cannot be written."""
        try:
            for result in results:
                self._file.write(json.dumps(result, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ClaimError(f"{self.part}: {error.strerror}; make room and try again", field="out") from None
        self.tally.update(
            r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2]
            for r in results
        )
