"""Streaming parser of the files in a multipart/form-data body (RFC 7578)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from mtlsign.service.problems import Problem

MAX_HEADER_BYTES = 4096
MAX_FILES = 4
_BOUNDARY = re.compile(
    r'multipart/form-data\s*;.*\bboundary="?([A-Za-z0-9\'()+_,./:=? -]{1,70})"?', re.IGNORECASE
)
_NAME = re.compile(
    rb'^content-disposition:\s*form-data\b.*[;\s]name="([a-z]{1,32})"', re.IGNORECASE | re.MULTILINE
)


def boundary_of(content_type: str) -> bytes:
    """Return the boundary in a Content-Type. Raises Problem."""
    match = _BOUNDARY.match(content_type.strip())
    if match is None:
        raise Problem("wrong-media-type", "The body is not a form with files. Send multipart/form-data.")
    return match[1].rstrip().encode()


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
    delimiter, buffer = b"\r\n--" + boundary, b"\r\n"
    field: str | None = None
    in_header, parts = False, 0
    async for piece in stream:
        buffer += piece
        while True:
            if in_header:
                header, end, rest = buffer.partition(b"\r\n\r\n")
                if buffer.startswith(b"--"):  # the last delimiter
                    return
                if not end:
                    break
                field, buffer, in_header, parts = _field_name(header), rest, False, parts + 1
                if parts > MAX_FILES:
                    raise _malformed()
            data, separator, rest = buffer.partition(delimiter)
            if not separator:
                safe = max(0, len(buffer) - len(delimiter))
                if field is not None and safe:
                    yield field, buffer[:safe]
                buffer = buffer[safe:]
                break
            if field is not None:
                if data:
                    yield field, data
                yield field, None
            buffer, in_header = rest, True
        if in_header and len(buffer) > MAX_HEADER_BYTES:
            raise _malformed()
    raise _malformed()


def _field_name(header: bytes) -> str:
    match = _NAME.search(header.lstrip())
    if len(header) > MAX_HEADER_BYTES or match is None:
        raise _malformed()
    return match[1].decode()


def _malformed() -> Problem:
    return Problem("malformed-request", "The form with files is damaged. Select the files again.")
