"""Claims and results as files of lines, for bulk work."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """One result on each line; the file appears whole. Raises ClaimError when it cannot be written."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            for result in results:
                file.write(json.dumps(result, allow_nan=False) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise ClaimError(f"{path}: {error.strerror}; choose another file", field="out") from None
    finally:
        part.unlink(missing_ok=True)


def tally(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many of each status, problems by their type."""
    names = (
        r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2] for r in results
    )
    return dict(Counter(names))
