"""Tokens of HTTP requests: the bearer header of programs and the session cookie of pages."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth import tokens
from mtlsign.service.auth.tokens import TokenRows
from mtlsign.service.problems import Problem

#: Name of the session cookie over https. Browsers accept the prefix only with Secure, Path=/ and no Domain.
SECURE_COOKIE = "__Host-mtlsign_session"
#: Name over plain http, where browsers refuse a cookie with that prefix.
LOCAL_COOKIE = "mtlsign_session"


def uses_https(settings: ServiceSettings) -> bool:
    """Return whether browsers reach the pages over https."""
    return settings.public_url.startswith("https://") or settings.tls_cert is not None


def session_cookie(settings: ServiceSettings) -> str:
    """Return the name of the session cookie."""
    return SECURE_COOKIE if uses_https(settings) else LOCAL_COOKIE


class TokenReader:
    """Read-only view of the tokens in a database that another process of this machine owns."""

    def __init__(self, path: Path) -> None:
        self._path, self.clock = path, time.time

    def fetch_all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query. Raises sqlite3.Error, for example if the file does not exist."""
        with closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()


def token_id_of_request(database: TokenRows, headers: Mapping[bytes, bytes]) -> str | None:
    """Return the id of the valid token behind a request, or None.

    Args:
        database: tokens and sessions.
        headers: headers of the request, with names in lower case.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    header = headers.get(b"authorization")
    if header is not None:
        try:
            return tokens.token_of_header(database, header.decode("latin-1")).id
        except Problem:
            return None
    try:
        cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
    except CookieError:
        return None
    for name in (SECURE_COOKIE, LOCAL_COOKIE):
        token = tokens.token_of_session(database, cookies[name].value) if name in cookies else None
        if token is not None:
            return token.id
    return None
