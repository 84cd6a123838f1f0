"""Bearer tokens with scopes, stored as hashes, and the sessions of the web pages.

A token is `mtls_<id>_<secret>` with 256 random bits. SHA-256 suffices for such a secret, and a lookup by
hash takes the same time for a nearly right token as for any other.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from mtlsign.service.database import Database
from mtlsign.service.problems import Problem

SCOPES = ("verify", "ledger", "admin")
_TOKEN = re.compile(r"mtls_[0-9a-f]{12}_[0-9a-f]{64}")
SESSION_S = 8 * 3600.0
#: Sessions of one token. A further one ends the oldest.
MAX_SESSIONS = 10


class TokenRows(Protocol):
    """Rows of tokens and sessions, and the clock of their expiry."""

    @property
    def clock(self) -> Any:
        """Function that returns the seconds since the epoch."""

    def fetch_all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""


@dataclass(frozen=True)
class Token:
    """Valid token: its id (for the log), name and scopes."""

    id: str
    name: str
    scopes: frozenset[str]

    def require_scope(self, scope: str) -> None:
        """Raise Problem `forbidden` if the token lacks the scope."""
        if scope not in self.scopes:
            detail = f"This token lacks the scope {scope!r}. Ask the operator for one that has it."
            raise Problem("forbidden", detail)


def issue(database: Database, name: str, scopes: Iterable[str], hours: float) -> str:
    """Create a token and return its text, which cannot be read again later.

    Args:
        database: database of the service.
        name: name of the holder, 1 to 64 printable characters.
        scopes: some of `SCOPES`.
        hours: time until the token expires.

    Raises:
        Problem: `malformed-request` for an unknown scope or an invalid name.
    """
    names = sorted(set(scopes))
    if not names or not set(names) <= set(SCOPES):
        raise Problem("malformed-request", f"scopes must be some of {', '.join(SCOPES)}.")
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise Problem("malformed-request", "The name of a token has 1 to 64 printable characters.")
    token_id = secrets.token_hex(6)
    text = f"mtls_{token_id}_{secrets.token_hex(32)}"
    now = database.clock()
    database.execute(
        "INSERT INTO tokens VALUES(?,?,?,?,?,?,NULL)",
        token_id, _hash(text), name, " ".join(names), now, now + hours * 3600,
    )  # fmt: skip
    return text


def revoke(database: Database, token_id: str) -> bool:
    """Revoke a token with its sessions and open requests; return False if no valid token has that id."""
    return database.revoke(token_id)


def list_tokens(database: Database) -> list[dict[str, object]]:
    """Return all tokens without their secrets."""
    rows = database.fetch_all("SELECT id,name,scopes,created,expires,revoked FROM tokens ORDER BY created")
    names = ("id", "name", "scopes", "created", "expires", "revoked")
    return [dict(zip(names, row, strict=True)) | {"scopes": row[2].split()} for row in rows]


def check(database: TokenRows, text: str) -> Token:
    """Return the token of that text. Raises Problem `unauthenticated`, with one text for every reason."""
    if _TOKEN.fullmatch(text):
        rows = database.fetch_all(
            "SELECT id,name,scopes FROM tokens WHERE hash=? AND revoked IS NULL AND expires>?",
            _hash(text), database.clock(),
        )  # fmt: skip
        if rows:
            return _token(rows[0])
    detail = "The token is missing, unknown, revoked or expired. Ask the operator for a token."
    raise Problem("unauthenticated", detail)


def token_of_header(database: TokenRows, header: str | None) -> Token:
    """Return the token of an Authorization header. Raises Problem `unauthenticated`."""
    scheme, _, text = (header or "").partition(" ")
    return check(database, text.strip() if scheme.lower() == "bearer" else "")


def open_session(database: Database, text: str) -> str:
    """Exchange the text of a token for the secret of a session, which is stored in a cookie."""
    token, secret = check(database, text.strip()), secrets.token_hex(32)
    expires = database.clock() + SESSION_S
    database.execute("INSERT INTO sessions VALUES(?,?,?)", _hash(secret), token.id, expires)
    newest = "SELECT hash FROM sessions WHERE token=? AND hash<>? ORDER BY expires DESC LIMIT ?"
    database.execute(
        f"DELETE FROM sessions WHERE token=? AND hash<>? AND hash NOT IN ({newest})",
        token.id, _hash(secret), token.id, _hash(secret), MAX_SESSIONS - 1,
    )  # fmt: skip
    return secret


def token_of_session(database: TokenRows, secret: str | None) -> Token | None:
    """Return the token of a session if both are valid."""
    if not secret or len(secret) != 64:
        return None
    rows = database.fetch_all(
        "SELECT t.id,t.name,t.scopes FROM sessions s JOIN tokens t ON t.id=s.token "
        "WHERE s.hash=? AND s.expires>? AND t.revoked IS NULL AND t.expires>?",
        _hash(secret), database.clock(), database.clock(),
    )  # fmt: skip
    return _token(rows[0]) if rows else None


def close_session(database: Database, secret: str | None) -> None:
    """Delete a session."""
    database.execute("DELETE FROM sessions WHERE hash=?", _hash(secret or ""))


def _token(row: tuple[Any, ...]) -> Token:
    return Token(row[0], row[1], frozenset(row[2].split()))


def _hash(text: str) -> bytes:
    return hashlib.sha256(b"mtlsign/v1/token" + text.encode()).digest()
