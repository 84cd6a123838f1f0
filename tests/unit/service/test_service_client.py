"""The client library over a real socket: uploads, verdicts, repetition with the idempotency key, refusals."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_service_page import served  # type: ignore[import-not-found]

from mtlsign.errors import ClusterError, SettingsError
from mtlsign.service.auth.signing import read_verdict
from mtlsign.service.client import Client, RequestRejected
from tests.helpers.tls_fixtures import certificate
from tests.unit.service.fixtures import Goods, Service


def test_from_upload_to_checked_verdict(service: Service, goods: Goods) -> None:
    with served(service) as url, Client(url, service.token(), patience_s=30) as client:
        file = goods.folder / "marked.safetensors"
        pointer = client.upload(file)
        assert pointer == f"sha256:{goods.digest}" == client.upload(file)
        results = client.verify([goods.claim(pointer), goods.claim(pointer, goods.wrong)], wait_s=0)
        assert [r["verdict"]["status"] for r in results] == ["accepted", "rejected"]
        said = read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())
        assert said["suspect"] == goods.digest
        with pytest.raises(RequestRejected) as caught:
            client.verify([])
        assert caught.value.problem["type"].endswith("malformed-request")
        assert service.token() not in repr(client)


def test_what_dies_on_the_way_is_sent_again_and_answered_once() -> None:
    """A server that loses the answer, is busy, loses its app, then answers: one key over all three."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            keys.append(self.headers["Idempotency-Key"])
            if len(keys) == 1:
                self.connection.close()
                return
            self.send_response({2: 503, 3: 500}.get(len(keys), 200))  # 500 without a problem: a proxy's
            if len(keys) == 2:
                self.send_header("Retry-After", "0")
            body = b'{"id":"x","state":"done","results":[]}'
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Client(f"http://127.0.0.1:{server.server_address[1]}", "t", patience_s=20) as client:
            assert client.verify([{}]) == []
    finally:
        server.shutdown()
        server.server_close()
    assert len(keys) == 4 and len(set(keys)) == 1


def test_nobody_there_and_no_address(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9", "t", patience_s=0.3) as client, pytest.raises(ClusterError):
        client.keys()
    for url in ("127.0.0.1:8000", "ftp://x", "http://user:pw@host"):
        with pytest.raises(SettingsError):
            Client(url, "t")


def test_over_tls_with_a_private_authority(service: Service, goods: Goods, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with served(service, ssl_certfile=str(cert), ssl_keyfile=str(key)) as url:
        url = url.replace("http://127.0.0.1", "https://localhost")
        with Client(url, service.token(), ca=cert, patience_s=20) as client:
            assert client.verify([goods.claim()])[0]["verdict"]["status"] == "accepted"
        with Client(url, service.token(), patience_s=0.5) as client, pytest.raises(ClusterError):
            client.keys()  # an authority that this client does not know
        with (
            pytest.raises(ClusterError),
            Client(url.replace("localhost", "127.0.0.1"), "t", ca=cert, patience_s=0.5) as client,
        ):
            client.keys()  # another name than the certificate's
