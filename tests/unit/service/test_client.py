"""Client library over a real socket: uploads, verdicts, retries and rejections."""

from __future__ import annotations

import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mtlsign.errors import ClusterError, SettingsError
from mtlsign.service.auth.signing import read_verdict
from mtlsign.service.client import Client, RequestRejected
from tests.helpers.tls_fixtures import certificate
from tests.unit.service.fixtures import ClaimFixtures, ServiceHarness, serve_on_socket


def test_client_uploads_verifies_and_checks_verdict(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    with serve_on_socket(service) as url, Client(url, service.token(), timeout_s=30) as client:
        file = claim_fixtures.folder / "marked.safetensors"
        location = client.upload(file)
        assert location == f"sha256:{claim_fixtures.digest}" == client.upload(file)
        results = client.verify(
            [claim_fixtures.claim(location), claim_fixtures.claim(location, claim_fixtures.wrong_bundle)],
            wait_s=0,
        )
        assert [r["verdict"]["status"] for r in results] == ["accepted", "rejected"]
        verdict = read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())
        assert verdict["suspect"] == claim_fixtures.digest
        with pytest.raises(RequestRejected) as caught:
            client.verify([])
        assert caught.value.problem["type"].endswith("malformed-request")
        assert service.token() not in repr(client)


def test_client_retries_lost_requests_with_one_idempotency_key() -> None:
    """The server closes the connection, is busy, answers like a proxy without app, then succeeds."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            keys.append(self.headers["Idempotency-Key"])
            if len(keys) == 1:
                self.connection.close()
                return
            self.send_response({2: 503, 3: 500}.get(len(keys), 200))  # a 500 without problem is a proxy's
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
        with Client(f"http://127.0.0.1:{server.server_address[1]}", "t", timeout_s=20) as client:
            assert client.verify([{}]) == []
    finally:
        server.shutdown()
        server.server_close()
    assert len(keys) == 4 and len(set(keys)) == 1


def test_client_without_service_or_with_invalid_url_raises(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9", "t", timeout_s=0.3) as client, pytest.raises(ClusterError):
        client.keys()
    for url in ("127.0.0.1:8000", "ftp://x", "http://user:pw@host"):
        with pytest.raises(SettingsError):
            Client(url, "t")


def test_client_with_private_authority_verifies_over_tls(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path)
    with serve_on_socket(service, ssl_certfile=str(cert), ssl_keyfile=str(key)) as url:
        url = url.replace("http://127.0.0.1", "https://localhost")
        with Client(url, service.token(), ca=cert, timeout_s=20) as client:
            assert client.verify([claim_fixtures.claim()])[0]["verdict"]["status"] == "accepted"
        with Client(url, service.token(), timeout_s=0.5) as client, pytest.raises(ClusterError):
            client.keys()  # an authority that this client does not know
        with (
            pytest.raises(ClusterError),
            Client(url.replace("localhost", "127.0.0.1"), "t", ca=cert, timeout_s=0.5) as client,
        ):
            client.keys()  # another name than the certificate's


def test_client_warns_before_it_sends_token_over_plain_http() -> None:
    with pytest.warns(UserWarning, match="unencrypted"):
        Client("http://verify.example.org:8000", "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for url in ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:1", "https://a.example.org"):
            Client(url, "t")
