"""TLS files of an etcd client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """PEM files for mutual TLS: certificate of the authority, client certificate, client key."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
