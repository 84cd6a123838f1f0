"""Files of claims and results with one JSON value in each line."""

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
    """Read the claims of a file. A line that is not JSON becomes None, whose result is a problem.

    Raises:
        ClaimError: the file cannot be read, is over a limit or contains no claim.
    """
    claims: list[Any] = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE or len(claims) >= MAX_CLAIMS:
                    message = f"{path} has a line or a number of lines over the limit. Split the file."
                    raise ClaimError(message, field="claims")
                if line.strip():
                    claims.append(_parse(line))
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror}. Pass a file of claims."
        raise ClaimError(message, field="claims") from None
    if not claims:
        raise ClaimError(f"{path} contains no claim. Write one claim in each line.", field="claims")
    return claims


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class ResultWriter:
    """Writer of one result per line, as results arrive: to `PATH.part`, renamed to `PATH` at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.tally: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Open the file. Raises ClaimError if it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("w", encoding="utf-8")
        except OSError as error:
            message = f"{self.path} cannot be written: {error.strerror}. Choose another file."
            raise ClaimError(message, field="output") from None
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self.part, self.path)

    def add(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Append results. Raises ClaimError if they cannot be written."""
        try:
            for result in results:
                self._file.write(json.dumps(result, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            message = f"{self.part} cannot be written: {error.strerror}. Free space and try again."
            raise ClaimError(message, field="output") from None
        self.tally.update(
            r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2]
            for r in results
        )
