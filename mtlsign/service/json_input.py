"""One way to read a stranger's JSON: what parsing may cost is known before it begins.

A body of 32 MB can hold ten million empty lists, which take a gigabyte once parsed; so the marks that begin
a value are counted first. Not for key material, which `mtlsign.storage.base.strict_json` reads more strictly.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

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


def read_form(raw: bytes, *, most: int = 10) -> dict[str, str]:
    """The fields of a form, application/x-www-form-urlencoded. Raises: ValueError."""
    if raw.count(b"&") >= most:
        raise ValueError(f"over {most} fields")
    found = {}
    for field in filter(None, raw.split(b"&")):
        name, equals, value = field.partition(b"=")
        if not equals:
            raise ValueError("a field without a value")
        found[_unquoted(name)] = _unquoted(value)
    return found


def _unquoted(raw: bytes, piece: int = 2**16) -> str:
    """Decoded piece by piece: the library makes an object of some 80 bytes of every escape."""
    out, at = bytearray(), 0
    while at < len(raw):
        end = at + piece
        cut = raw.rfind(b"%", max(at + 1, end - 2), end) if end < len(raw) else -1
        end = cut if cut > 0 else end
        out += unquote_to_bytes(raw[at:end].replace(b"+", b" "))
        at = end
    return out.decode("utf-8")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field twice")
    return found


def _no_number(_: str) -> NoReturn:
    raise ValueError("no number")
