"""Parser of multipart forms: any division of the body into pieces gives the same files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mtlsign.service.problems import Problem
from mtlsign.service.web.multipart import boundary_of, file_pieces

BOUNDARY = "----WebKitFormBoundary7MA4YWxk"
DATA = b"a\r\n--" + BOUNDARY[:-1].encode() + b"\r\n\r\nb" * 50


def body(data: bytes = DATA) -> bytes:
    """Return a form with a model of those bytes and an empty claim file."""
    parts = b""
    for name, content in (("model", data), ("bundle", b"")):
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n'
        parts += head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n"
    return parts + f"--{BOUNDARY}--\r\n".encode()


def parse(data: bytes, size: int) -> dict[str, bytes]:
    """Return the files of a body that arrives in pieces of `size` bytes."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), size):
            yield data[at : at + size]

    async def run() -> dict[str, bytes]:
        files, complete = {}, set()
        async for field, piece in file_pieces(pieces(), BOUNDARY.encode()):
            files[field] = files.get(field, b"") + (piece or b"")
            if piece is None:
                complete.add(field)
        assert complete == set(files)
        return files

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
def test_file_pieces_are_independent_of_the_division_of_the_body(size: int) -> None:
    assert parse(body(), size) == {"model": DATA, "bundle": b""}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no form", body()[:-40], body().replace(b"form-data", b"x"),
        body().replace(b'"model"', b'"<b>"'),
        b"--" + BOUNDARY.encode() + b"\r\n" + b"x" * 10_000, body() [: -len(BOUNDARY) - 6] * 3,
    ],
)  # fmt: skip
def test_file_pieces_of_damaged_form_raise_a_problem(data: bytes) -> None:
    with pytest.raises(Problem, match="malformed-request"):
        parse(data, 1000)


def test_boundary_of_other_content_is_refused() -> None:
    assert boundary_of(f"multipart/form-data; boundary={BOUNDARY}") == BOUNDARY.encode()
    assert boundary_of(f'multipart/form-data; charset=utf-8; boundary="{BOUNDARY}"') == BOUNDARY.encode()
    for kind in ("", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "é"):
        with pytest.raises(Problem, match="wrong-media-type"):
            boundary_of(kind)
