"""Strict JSON for hashed and signed documents: the bytes have one meaning only.

Two parsers may disagree about floats, duplicate fields or large integers, so such documents hold none.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from mtlsign.errors import FormatError, KeyMaterialError

MAX_BRACKETS = 64
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_FIX = "Write the document with MTLSign; docs/format.md defines its fields."


def raise_invalid(where: str, message: str) -> NoReturn:
    """Raise FormatError for the field `where`. `message` is a sentence without its full stop."""
    raise FormatError(message, _FIX, field=where)


def parse_strict_json(data: bytes, *, limit: int, where: str, max_brackets: int = MAX_BRACKETS) -> object:
    """Parse UTF-8 JSON that has one meaning only.

    Refused: a byte order mark, invalid UTF-8, duplicate fields, floats, NaN and Infinity, -0, integers
    outside signed 64 bit.

    Args:
        data: the document.
        limit: most bytes.
        where: the field that errors name.
        max_brackets: most opening brackets.

    Raises:
        KeyMaterialError: the document breaks one of these rules; the message never quotes the data.
    """
    if len(data) > limit:
        raise KeyMaterialError(
            f"The document is over {limit} bytes. Pass the file that MTLSign wrote.", field=where
        )
    if data.count(b"[") + data.count(b"{") > max_brackets:
        raise KeyMaterialError(
            f"The document has more than {max_brackets} brackets. Pass the file that MTLSign wrote.",
            field=where,
        )

    def integer(text: str) -> int:
        value = int(text) if _INTEGER.fullmatch(text) else 1 << 64
        if text == "-0" or not -(1 << 63) <= value < 1 << 63:
            raise_invalid(where, "The document has an integer that is -0 or outside 64 bits")
        return value

    def refuse(_: str) -> NoReturn:
        raise_invalid(where, "The document has a number that is not an integer")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise_invalid(where, "The document has a field twice")
        return fields

    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise_invalid(where, "The document starts with a byte order mark")
        parsed: object = json.loads(
            text, parse_int=integer, parse_float=refuse, parse_constant=refuse, object_pairs_hook=unique
        )
    except (ValueError, RecursionError):  # their messages quote the data, which may be secret
        raise KeyMaterialError(
            "The document is not UTF-8 JSON. Pass the file that MTLSign wrote.", field=where
        ) from None
    return parsed


def require_fields(value: object, where: str, *names: str) -> dict[str, object]:
    """Return `value` as an object with exactly the fields `names`; raise FormatError for the first fault."""
    if not isinstance(value, dict):
        raise_invalid(where, "The value must be an object")
    for name in names:
        if name not in value:
            raise_invalid(f"{where}.{name}", "The field is missing")
    for name in value:
        if name not in names:
            raise_invalid(where, f"The object has the unknown field {ascii(name)[:60]}")
    return value


def require_hex(value: object, where: str, size: int) -> bytes:
    """Return the `size` bytes that `value` spells in lower-case hexadecimal; raise FormatError otherwise."""
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise_invalid(where, f"The value must be {2 * size} lower-case hexadecimal digits")
    return bytes.fromhex(value)
