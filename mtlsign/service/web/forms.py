"""Bounded parser of HTML form bodies."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

_PIECE = 2**16


def parse_form(data: bytes, *, max_fields: int = 10) -> dict[str, str]:
    """Parse an application/x-www-form-urlencoded body.

    Raises:
        ValueError: the body has more than `max_fields` fields, a field without a value, or invalid UTF-8.
    """
    if data.count(b"&") >= max_fields:
        raise ValueError(f"more than {max_fields} fields")
    fields = {}
    for field in filter(None, data.split(b"&")):
        name, equals, value = field.partition(b"=")
        if not equals:
            raise ValueError("a field without a value")
        fields[unquote(name)] = unquote(value)
    return fields


def unquote(data: bytes, piece_bytes: int = _PIECE) -> str:
    """Decode %-escapes piece by piece: the library creates an object of about 80 bytes for each escape."""
    text, start = bytearray(), 0
    while start < len(data):
        end = start + piece_bytes
        split_escape = data.rfind(b"%", max(start + 1, end - 2), end) if end < len(data) else -1
        end = split_escape if split_escape > 0 else end
        text += unquote_to_bytes(data[start:end].replace(b"+", b" "))
        start = end
    return text.decode("utf-8")
