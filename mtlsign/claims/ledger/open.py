"""Factory of ledgers: selects the backend by the scheme of the URI."""

from __future__ import annotations

import os
from pathlib import Path

from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import LedgerError

_SQLITE = "sqlite:///"


def open_ledger(uri: str, *, tls: Tls | None = None, create: bool = False) -> Ledger:
    """Open the ledger at `sqlite:///PATH` or `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`.

    Args:
        uri: location. PATH is used unchanged, so an absolute path makes four slashes.
        tls: etcd's files. Default: ETCDCTL_CACERT, ETCDCTL_CERT and ETCDCTL_KEY, the names that etcd uses.
        create: create a missing SQLite file. An etcd ledger is created by its first entry.

    Raises:
        LedgerError: unknown scheme, missing file, missing TLS files, or unreachable servers.
    """
    require_known_scheme(uri)
    if uri.startswith(_SQLITE):
        from mtlsign.claims.ledger.sqlite import SqliteLedger

        return SqliteLedger(Path(os.path.expanduser(uri.removeprefix(_SQLITE))), create=create)
    from mtlsign.claims.ledger.etcd import open_etcd

    return open_etcd(uri, tls or Tls())


def require_known_scheme(uri: str) -> None:
    """Raise `LedgerError` unless the URI names a backend and a path."""
    has_path = uri.startswith(_SQLITE) and len(uri) > len(_SQLITE) and "\0" not in uri
    if not has_path and not uri.startswith("etcd://"):
        raise LedgerError(
            "The URI has an unknown scheme or no path. Use sqlite:///PATH or etcd://HOST:PORT[,…].",
            field="ledger",
        )
