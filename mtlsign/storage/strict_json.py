"""Reading JSON from strangers: bytes that can mean one thing only, or a KeyMaterialError.

Two readers may disagree about floats, duplicate names or odd integers, so hashed and signed JSON holds none.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from mtlsign.errors import FormatError, KeyMaterialError

MAX_BRACKETS = 64
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_FIX = "docs/format.md says what belongs here, and mtlsign.watermark.keys.opening writes it"


def raise_invalid(where: str, message: str) -> NoReturn:
    """Raise FormatError for field `where`, with the fix appended."""
    raise FormatError(message, _FIX, field=where)


def parse_strict_json(data: bytes, *, limit: int, where: str) -> object:
    """Parse UTF-8 JSON that has one meaning only.

    Refused: more than `limit` bytes, a byte order mark, invalid UTF-8, more than 64 opening brackets,
    duplicate names, floats, NaN and Infinity, -0, integers outside signed 64 bit.

    Raises:
        KeyMaterialError: for each of these; the text never quotes the data.
    """
    if len(data) > limit:
        raise KeyMaterialError(f"is over {limit} bytes; pass the file that MTLSign wrote", field=where)
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise KeyMaterialError("holds too many brackets; pass the file that MTLSign wrote", field=where)

    def integer(text: str) -> int:
        value = int(text) if _INTEGER.fullmatch(text) else 1 << 64
        if text == "-0" or not -(1 << 63) <= value < 1 << 63:
            raise_invalid(where, "holds an integer that is -0 or outside 64 bits")
        return value

    def refused(_: str) -> NoReturn:
        raise_invalid(where, "holds a number that is not an integer")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise_invalid(where, "holds a field twice")
        return found

    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise_invalid(where, "starts with a byte order mark")
        parsed: object = json.loads(
            text, parse_int=integer, parse_float=refused, parse_constant=refused, object_pairs_hook=unique
        )
    except (ValueError, RecursionError):  # the first two kinds of ValueError here hold the data: drop them
        raise KeyMaterialError("is not UTF-8 JSON; pass the file that MTLSign wrote", field=where) from None
    return parsed


def require_fields(value: object, where: str, *names: str) -> dict[str, object]:
    """`value` as an object that holds exactly these fields; KeyMaterialError names the first one amiss."""
    if not isinstance(value, dict):
        raise_invalid(where, "must be an object")
    for name in names:
        if name not in value:
            raise_invalid(f"{where}.{name}", "is missing")
    for name in value:
        if name not in names:
            raise_invalid(where, f"unknown field {ascii(name)[:60]}")
    return value


def require_hex(value: object, where: str, size: int) -> bytes:
    """`value` as `size` bytes in lower-case hexadecimal."""
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise_invalid(where, f"must be {2 * size} lower-case hexadecimal digits")
    return bytes.fromhex(value)
