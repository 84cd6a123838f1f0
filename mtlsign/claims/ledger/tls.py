"""mtlsign.claims.ledger.tls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """Client's files for etcd's mutual TLS: the authority's certificate, our certificate, our key."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
