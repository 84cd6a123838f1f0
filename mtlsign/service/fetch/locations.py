"""Where a claim may point: `sha256:HEX` (an upload), `file://`, `s3://` and `https://` under the operator's
prefixes (design decision 8). Parsing contacts nothing; `web` and `files` follow what was allowed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from mtlsign.errors import SettingsError
from mtlsign.service.problems import Problem

MAX_POINTER = 2048
MAX_PARTS = 64

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SEGMENT = re.compile(r"[A-Za-z0-9._=+@~-]{1,255}")
_HOST = re.compile(
    r"(?=.{1,253}$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)+"
)
_NUMERIC = re.compile(r"(0x)?[0-9a-f]+", re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_QUERY = re.compile(r"[A-Za-z0-9._~=&%+,;:@/-]{0,1024}")


@dataclass(frozen=True)
class UploadedFile:
    """A model that the token's owner sent up."""

    digest: str


@dataclass(frozen=True)
class LocalFile:
    """A file below an allowed folder, by the names that lead from there to it."""

    root: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class S3Object:
    """An object, or a folder of them, in an allowed bucket."""

    bucket: str
    key: str


@dataclass(frozen=True)
class HttpsResource:
    """An https resource of an allowed host."""

    host: str
    port: int
    path: str


Source = UploadedFile | LocalFile | S3Object | HttpsResource


@dataclass(frozen=True)
class AllowedLocations:
    """The operator's prefixes: (scheme, where, path parts)."""

    prefixes: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, text: str) -> AllowedLocations:
        """From the setting `allow`. Raises SettingsError for a prefix that is none."""
        found = []
        for one in filter(None, (part.strip() for part in text.split(","))):
            try:
                found.append(_split(one)[:3])
            except (Problem, ValueError):
                raise SettingsError(
                    f"{one[:80]!r} is no prefix; write file:///DIR, s3://BUCKET/PREFIX or https://HOST/PATH",
                    field="allow",
                ) from None
        return cls(tuple(found))

    def source(self, pointer: str) -> Source:
        """What a pointer leads to. Raises Problem `pointer-refused` unless an operator's prefix covers it."""
        found = _DIGEST.fullmatch(pointer)
        if found:
            return UploadedFile(found[1])
        try:
            scheme, where, parts, tail = _split(pointer)
        except ValueError:
            raise location_refused(
                "cannot be read; write sha256:, s3://, file:// or https:// and plain names"
            ) from None
        for allowed, place, first in self.prefixes:
            if allowed != scheme or parts[: len(first)] != first or len(parts) == len(first) == 0:
                continue
            if scheme == "file":
                return LocalFile("/" + "/".join(first), parts[len(first) :])
            if place == where:
                if scheme == "s3":
                    return S3Object(where, "/".join(parts))
                host, _, port = where.partition(":")
                return HttpsResource(host, int(port or 443), "/" + "/".join(parts) + tail)
        raise location_refused(
            "is under none of the prefixes that this service's operator allows (setting allow)"
        )


def location_refused(why: str) -> Problem:
    """The problem of a pointer. It never repeats the pointer, which may hold somebody's secret."""
    return Problem("pointer-refused", f"the pointer {why}")


def _split(pointer: str) -> tuple[str, str, tuple[str, ...], str]:
    """(scheme, bucket or host[:port], path parts, query with its "?"). Raises ValueError for the rest."""
    if not 1 <= len(pointer) <= MAX_POINTER or not pointer.isascii() or not pointer.isprintable():
        raise ValueError
    found = urlsplit(pointer)
    if (
        found.scheme not in ("file", "s3", "https")
        or found.fragment
        or "@" in found.netloc
        or "\\" in pointer
    ):
        raise ValueError
    if (found.query or pointer.endswith("?")) and (
        found.scheme != "https" or not _QUERY.fullmatch(found.query)
    ):
        raise ValueError
    parts = _parts(found.path)
    where = found.netloc
    if found.scheme == "file" and where not in ("", "localhost"):
        raise ValueError
    if found.scheme == "s3" and not _BUCKET.fullmatch(where):
        raise ValueError
    if found.scheme == "https":
        host, colon, port = where.lower().partition(":")
        last = host.rpartition(".")[2]
        if not _HOST.fullmatch(host) or _NUMERIC.fullmatch(last) or (colon and not 1 <= int(port) <= 65_535):
            raise ValueError  # names only: an address is never written by a stranger
        where = f"{host}:{int(port)}" if colon and int(port) != 443 else host
    return (
        found.scheme,
        "" if found.scheme == "file" else where,
        parts,
        f"?{found.query}" if found.query else "",
    )


def _parts(path: str) -> tuple[str, ...]:
    parts: Sequence[str] = path.strip("/").split("/") if path.strip("/") else ()
    if len(parts) > MAX_PARTS or any(p in (".", "..") or not _SEGMENT.fullmatch(p) for p in parts):
        raise ValueError
    return tuple(parts)
