"""Messages of the etcd client about refused requests. `tests/services` uses real servers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mtlsign.claims.ledger import etcd_client
from mtlsign.claims.ledger.etcd_client import EtcdClient
from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import LedgerError


def client_of(monkeypatch: pytest.MonkeyPatch, status: int, body: dict[str, Any]) -> EtcdClient:
    """Return a client whose only server gives one response."""
    monkeypatch.setattr(etcd_client, "_context", lambda _: None)
    client = EtcdClient(["etcd.example:2379"], Tls())
    response = SimpleNamespace(
        status=status, read=lambda _: json.dumps(body).encode(), release_conn=lambda: None
    )
    monkeypatch.setattr(client._pool, "request", lambda *_, **__: response)
    return client


@pytest.mark.parametrize(
    ("status", "code", "text", "remedy"),
    [
        (429, 8, "etcdserver: mvcc: database space exceeded", "--quota-backend-bytes"),
        (400, 3, "etcdserver: request is too large", "--max-request-bytes"),
        (400, 11, "etcdserver: mvcc: required revision has been compacted", "check --head"),
        (403, 7, "etcdserver: permission denied", "Check the URI and the permissions"),
        (503, 14, "etcdserver: no leader", "Start the servers"),
    ],
)
def test_call_refused_by_server_names_cause_and_remedy(
    monkeypatch: pytest.MonkeyPatch, status: int, code: int, text: str, remedy: str
) -> None:
    client = client_of(monkeypatch, status, {"error": text, "code": code, "message": text})
    with pytest.raises(LedgerError) as raised:
        client.call("/v3/kv/txn", {}, limit=0.1)
    assert text in str(raised.value) and remedy in str(raised.value)
