"""mtlsign.claims.ledger.open."""

from __future__ import annotations

import os
from pathlib import Path

from mtlsign.claims.ledger.base import Ledger
from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import LedgerError


def open_ledger(uri: str, *, tls: Tls | None = None, create: bool = False) -> Ledger:
    """The ledger at `sqlite:///PATH` or `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`.

    Args:
        uri: where; PATH is taken as it is, so an absolute one makes four slashes.
        tls: etcd's files; else ETCDCTL_CACERT, ETCDCTL_CERT, ETCDCTL_KEY, etcd's own names.
        create: make an SQLite file that is not there; an etcd ledger is made by its first entry.

    Raises:
        LedgerError: another scheme, no such file, TLS files missing, or the servers cannot be reached.
    """
    if uri.startswith("sqlite:///") and len(uri) > len("sqlite:///") and "\0" not in uri:
        from mtlsign.claims.ledger.sqlite import SqliteLedger

        return SqliteLedger(Path(os.path.expanduser(uri.removeprefix("sqlite:///"))), create=create)
    if uri.startswith("etcd://"):
        from mtlsign.claims.ledger.etcd import open_etcd

        return open_etcd(uri, tls or Tls())
    raise LedgerError("knows no such place; give sqlite:///PATH or etcd://HOST:PORT[,…]", field="ledger")
