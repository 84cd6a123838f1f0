"""One way to read a stranger's JSON: what parsing may cost is known before it begins.

A body of 32 MB can hold ten million empty lists, which take a gigabyte once parsed; so the marks that begin
a value are counted first. Not for key material, which `mtlsign.strict_json` reads more strictly.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

#: Commas and opening brackets in one document: 256 claims have about 5,000. Each costs some 100 bytes.
MOST = 200_000


def read_json(raw: bytes, *, most: int = MOST) -> Any:
    """The value of UTF-8 JSON in which no field comes twice and every number is one.

    Raises: ValueError, also for documents nested too deeply or with over `most` values.
    """
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > most:
        raise ValueError(f"over {most} values")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field twice")
    return found


def _no_number(_: str) -> NoReturn:
    raise ValueError("no number")
