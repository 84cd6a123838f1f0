"""Files of a multipart/form-data body (RFC 7578), read from a stream without keeping them in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mtlsign.service.problems import Problem

MAX_HEADER_BYTES = 4096
MAX_FILES = 4
_BOUNDARY = re.compile(rb"[A-Za-z0-9'()+_,./:=? -]{1,70}")
_NAME = re.compile(rb"[a-z]{1,32}")


def boundary_of(content_type: str) -> bytes:
    """Return the boundary in a Content-Type. Raises Problem."""
    kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise Problem("wrong-media-type", "The body is not a form with files. Send multipart/form-data.")
    return boundary


async def file_pieces(
    stream: AsyncIterator[bytes], boundary: bytes
) -> AsyncIterator[tuple[str, bytes | None]]:
    """Yield (field, piece) for the bytes of each part, and (field, None) at the end of the part.

    Memory holds one received piece and less than 5 KiB more.

    Args:
        stream: pieces of the body.
        boundary: boundary of the parts.

    Raises:
        Problem: `malformed-request`.
    """
    form = _Form()
    parser = MultipartParser(boundary, form.callbacks(), max_header_size=MAX_HEADER_BYTES)  # type: ignore[arg-type]  # a TypedDict
    try:
        async for piece in stream:
            parser.write(piece)
            for event in form.events:
                yield event
            form.events.clear()
    except FormParserError:
        raise _malformed() from None
    if not form.is_complete:
        raise _malformed()


class _Form:
    """Events of one form, collected by the callbacks of a parser.

    Attributes:
        events: (field, piece) and (field, None) as in `file_pieces`.
        is_complete: whether the last delimiter was read.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, bytes | None]] = []
        self.is_complete = False
        self._field, self._parts = "", 0
        self._header, self._headers = [b"", b""], dict[bytes, bytes]()

    def callbacks(self) -> dict[str, object]:
        """Return the functions that a `MultipartParser` calls."""
        return {
            "on_header_field": lambda data, start, end: self._extend(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._extend(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start_part,
            "on_part_data": lambda data, start, end: self.events.append((self._field, data[start:end])),
            "on_part_end": lambda: self.events.append((self._field, None)),
            "on_end": self._end,
        }

    def _extend(self, index: int, data: bytes) -> None:
        self._header[index] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = [b"", b""]

    def _start_part(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"")
        self._parts, self._headers = self._parts + 1, {}
        if kind != b"form-data" or not _NAME.fullmatch(name) or self._parts > MAX_FILES:
            raise _malformed()
        self._field = name.decode()

    def _end(self) -> None:
        self.is_complete = True


def _malformed() -> Problem:
    return Problem("malformed-request", "The form with files is damaged. Select the files again.")
