"""Locations of models and bundles: uploads, files, S3 objects and https resources below allowed prefixes.

Parsing contacts no host. `model_cache` and `https` fetch resolved locations only. A client can therefore not
make the service read its own files or send requests inside the operator's network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from mtlsign.errors import SettingsError
from mtlsign.service.problems import Problem

MAX_LOCATION = 2048
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
    """File that a client has uploaded."""

    digest: str


@dataclass(frozen=True)
class LocalFile:
    """File below an allowed folder: the folder and the names from it to the file."""

    root: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class S3Object:
    """Object in an allowed bucket, or a prefix of objects."""

    bucket: str
    key: str


@dataclass(frozen=True)
class HttpsResource:
    """Resource of an allowed https host."""

    host: str
    port: int
    path: str


Location = UploadedFile | LocalFile | S3Object | HttpsResource


@dataclass(frozen=True)
class AllowedLocations:
    """The operator's prefixes: (scheme, bucket or host, path parts)."""

    prefixes: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    @classmethod
    def parse(cls, prefixes: Sequence[str]) -> AllowedLocations:
        """Parse the setting `allowed_locations`. Raises SettingsError for an invalid prefix."""
        parsed = []
        for prefix in filter(None, (text.strip() for text in prefixes)):
            try:
                parsed.append(_split(prefix)[:3])
            except (Problem, ValueError):
                fix = "Write file:///DIR, s3://BUCKET/PREFIX or https://HOST/PATH."
                message = f"{prefix[:80]!r} is not a prefix of locations. {fix}"
                raise SettingsError(message, field="allowed-locations") from None
        return cls(tuple(parsed))

    def resolve(self, text: str) -> Location:
        """Parse a location. Raises Problem `pointer-refused` unless one of the prefixes covers it."""
        upload = _DIGEST.fullmatch(text)
        if upload:
            return UploadedFile(upload[1])
        try:
            scheme, authority, parts, query = _split(text)
        except ValueError:
            fix = "Write sha256:, s3://, file:// or https:// and a path of plain names."
            raise location_refused(f"The location is malformed. {fix}") from None
        for allowed_scheme, allowed_authority, prefix in self.prefixes:
            if allowed_scheme != scheme or parts[: len(prefix)] != prefix or len(parts) == len(prefix) == 0:
                continue
            if scheme == "file":
                return LocalFile("/" + "/".join(prefix), parts[len(prefix) :])
            if allowed_authority == authority:
                if scheme == "s3":
                    return S3Object(authority, "/".join(parts))
                host, _, port = authority.partition(":")
                return HttpsResource(host, int(port or 443), "/" + "/".join(parts) + query)
        fix = "Ask the operator which locations are allowed (setting allowed_locations)."
        raise location_refused(f"The location is under none of the allowed prefixes. {fix}")


def location_refused(detail: str) -> Problem:
    """Return the problem of a refused location. `detail` must not repeat it: it may hold a secret."""
    return Problem("pointer-refused", detail)


def _split(text: str) -> tuple[str, str, tuple[str, ...], str]:
    """Return (scheme, bucket or host[:port], path parts, query with its "?"). Raises ValueError."""
    if not 1 <= len(text) <= MAX_LOCATION or not text.isascii() or not text.isprintable():
        raise ValueError
    url = urlsplit(text)
    if url.scheme not in ("file", "s3", "https") or url.fragment or "@" in url.netloc or "\\" in text:
        raise ValueError
    if (url.query or text.endswith("?")) and (url.scheme != "https" or not _QUERY.fullmatch(url.query)):
        raise ValueError
    parts = _parts(url.path)
    authority = url.netloc
    if url.scheme == "file" and authority not in ("", "localhost"):
        raise ValueError
    if url.scheme == "s3" and not _BUCKET.fullmatch(authority):
        raise ValueError
    if url.scheme == "https":
        authority = _https_authority(authority)
    return (
        url.scheme,
        "" if url.scheme == "file" else authority,
        parts,
        f"?{url.query}" if url.query else "",
    )


def _https_authority(text: str) -> str:
    """Return host[:port] in lower case. IP addresses are refused: a client may name public hosts only."""
    host, colon, port = text.lower().partition(":")
    last = host.rpartition(".")[2]
    if not _HOST.fullmatch(host) or _NUMERIC.fullmatch(last) or (colon and not 1 <= int(port) <= 65_535):
        raise ValueError
    return f"{host}:{int(port)}" if colon and int(port) != 443 else host


def _parts(path: str) -> tuple[str, ...]:
    parts: Sequence[str] = path.strip("/").split("/") if path.strip("/") else ()
    if len(parts) > MAX_PARTS or any(p in (".", "..") or not _SEGMENT.fullmatch(p) for p in parts):
        raise ValueError
    return tuple(parts)
