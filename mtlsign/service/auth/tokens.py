"""Who may ask what: bearer tokens with scopes, of which only a hash is stored, and the page's sessions.

A token is `mtls_<id>_<secret>`, 256 random bits; SHA-256 suffices for such a secret, and a lookup by hash
takes the same time whether the token is nearly right or not.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from mtlsign.service.database import Database
from mtlsign.service.problems import Problem

SCOPES = ("verify", "ledger", "admin")
_TOKEN = re.compile(r"mtls_[0-9a-f]{12}_[0-9a-f]{64}")
SESSION_S = 8 * 3600.0


@dataclass(frozen=True)
class Token:
    """A valid token: its id (for the log), name and scopes."""

    id: str
    name: str
    scopes: frozenset[str]

    def need(self, scope: str) -> None:
        """Raises Problem `forbidden` without that scope."""
        if scope not in self.scopes:
            raise Problem("forbidden", f"this token lacks the scope {scope!r}; ask for one that has it")


def issue(store: Database, name: str, scopes: Iterable[str], hours: float) -> str:
    """Make a token and return it, the only time that it is shown. Raises Problem for unknown scopes."""
    wanted = sorted(set(scopes))
    if not wanted or not set(wanted) <= set(SCOPES):
        raise Problem("malformed-request", f"scopes are some of {', '.join(SCOPES)}")
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise Problem("malformed-request", "a token's name has 1 to 64 printable characters")
    ident = secrets.token_hex(6)
    text = f"mtls_{ident}_{secrets.token_hex(32)}"
    now = store.clock()
    store.change(
        "INSERT INTO tokens VALUES(?,?,?,?,?,?,NULL)",
        ident, _hash(text), name, " ".join(wanted), now, now + hours * 3600,
    )  # fmt: skip
    return text


def revoke(store: Database, ident: str) -> bool:
    """End a token, its sessions and open requests now; False when there is none of that id."""
    return store.revoke(ident)


def known(store: Database) -> list[dict[str, object]]:
    """All tokens, without anything that opens a door."""
    found = store.rows("SELECT id,name,scopes,created,expires,revoked FROM tokens ORDER BY created")
    names = ("id", "name", "scopes", "created", "expires", "revoked")
    return [dict(zip(names, row, strict=True)) | {"scopes": row[2].split()} for row in found]


def check(store: Database, text: str) -> Token:
    """The token of that text. Raises Problem `unauthenticated`, the same for every reason."""
    if _TOKEN.fullmatch(text):
        found = store.rows(
            "SELECT id,name,scopes FROM tokens WHERE hash=? AND revoked IS NULL AND expires>?",
            _hash(text), store.clock(),
        )  # fmt: skip
        if found:
            return Token(found[0][0], found[0][1], frozenset(found[0][2].split()))
    raise Problem("unauthenticated", "the token is missing, unknown, revoked or expired; ask the operator")


def bearer(store: Database, header: str | None) -> Token:
    """The token of an Authorization header."""
    scheme, _, text = (header or "").partition(" ")
    return check(store, text.strip() if scheme.lower() == "bearer" else "")


def open_session(store: Database, text: str) -> str:
    """Exchange a token for a session's secret, which the page's cookie holds."""
    token, secret = check(store, text.strip()), secrets.token_hex(32)
    store.change("INSERT INTO sessions VALUES(?,?,?)", _hash(secret), token.id, store.clock() + SESSION_S)
    return secret


def session(store: Database, secret: str | None) -> Token | None:
    """The token behind a session, while both are valid."""
    if not secret or len(secret) != 64:
        return None
    found = store.rows(
        "SELECT t.id,t.name,t.scopes FROM sessions s JOIN tokens t ON t.id=s.token "
        "WHERE s.hash=? AND s.expires>? AND t.revoked IS NULL AND t.expires>?",
        _hash(secret), store.clock(), store.clock(),
    )  # fmt: skip
    return Token(found[0][0], found[0][1], frozenset(found[0][2].split())) if found else None


def close_session(store: Database, secret: str | None) -> None:
    """Forget a session."""
    store.change("DELETE FROM sessions WHERE hash=?", _hash(secret or ""))


def _hash(text: str) -> bytes:
    return hashlib.sha256(b"mtlsign/v0/token" + text.encode()).digest()
