"""Client of the verification service for scripts and notebooks: submit, wait, upload, download, check.

    from mtlsign.service.client import Client, make_claim
    with Client("http://127.0.0.1:8000", token) as service:
        model = service.upload("suspect.safetensors")
        [result] = service.verify([make_claim(model, opening, reference)])

A request is sent again after a lost connection or a status 429, 502, 503 or 504. Its idempotency key ensures
that no claim is answered twice, and none is lost if processes of the service crash.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import random
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

import urllib3

from mtlsign.errors import ClaimError, ClusterError, SettingsError
from mtlsign.watermark.keys.opening import KeyOpening

MAX_ANSWER = 64 * 2**20
_RETRY_STATUSES = (429, 502, 503, 504)


class RequestRejected(ClaimError):
    """The service rejected a request; `problem` is its RFC 9457 document."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{problem.get('title')}: {problem.get('detail')}", field="service")
        self.problem = dict(problem)


def make_claim(
    model: str, opening: KeyOpening, reference: bytes, *, head: bytes | None = None, claim: str | None = None
) -> dict[str, Any]:
    """Return one claim in the form that the service accepts. Sending it reveals the key to the operator.

    Args:
        model: location of the model, such as the result of `Client.upload`.
        opening: opening of the key (`kit.opening`).
        reference: safetensors bytes of the reference (`kit.reference`).
        head: safetensors bytes of a trained head (`kit.head`), or None.
        claim: id of the claim in the ledger, or None.
    """
    from mtlsign.service.verifier.claim_bundle import to_json

    return {"model": model, "bundle": to_json(opening, reference, head, claim)}


class Client:
    """Client of one service with one token.

    Args:
        url: `http://HOST:PORT` or `https://NAME`.
        token: token that the operator issued.
        timeout_s: seconds for one call, including its retries.
        ca: certificate file of a private certificate authority.

    Warns:
        UserWarning: the address is http on another machine, so the token can be read on the way.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 600, ca: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            message = "The address is not one of a service. Pass http://HOST:PORT or https://NAME."
            raise SettingsError(message, field="url")
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            message = f"The token crosses the network to {parts.hostname} unencrypted. Use an https address."
            warnings.warn(message, UserWarning, stacklevel=2)
        self.url, self._token, self.timeout_s = url.rstrip("/"), token, timeout_s
        timeout = urllib3.Timeout(connect=5, read=120)
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False, ca_certs=str(ca) if ca else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def __repr__(self) -> str:
        return f"Client({self.url!r}, token hidden)"

    def verify(self, claims: Sequence[Mapping[str, Any]], *, wait_s: float = 10) -> list[dict[str, Any]]:
        """Verify claims; return one result for each, in order: {"verdict", "id", "key"} or {"problem"}.

        Raises:
            RequestRejected: the whole request was rejected.
            ClusterError: the service cannot be reached, or does not finish in time.
        """
        return self.wait(self.submit(claims, wait_s=wait_s))

    def submit(
        self, claims: Sequence[Mapping[str, Any]], *, wait_s: float = 10, key: str | None = None
    ) -> dict[str, Any]:
        """Submit claims and return the document of the request, which may still be running.

        Args:
            claims: claims of `make_claim`.
            wait_s: seconds that the service waits for results before it answers.
            key: idempotency key; None: a random one.

        Raises:
            RequestRejected: the whole request was rejected.
            ClusterError: the service cannot be reached.
        """
        body = json.dumps({"claims": list(claims), "wait_s": wait_s}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or secrets.token_hex(16)}
        return _document(self._send("POST", "/v1/verifications", headers, lambda: body))

    def wait(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the results of a submitted request when all are complete."""
        end, current = time.monotonic() + self.timeout_s, dict(document)
        pause = 0.1
        while current["state"] != "done":
            if time.monotonic() > end:
                message = f"Request {current['id']} is not finished yet. Call wait again."
                raise ClusterError(message, field="service")
            time.sleep(pause)
            pause = min(1.5 * pause, 2.0)
            current = _document(self._send("GET", f"/v1/verifications/{current['id']}", {}))
        results: list[dict[str, Any]] = current["results"]
        return results

    def upload(self, file: str | Path) -> str:
        """Upload a model or bundle unless the service has it, and return its location, `sha256:HEX`."""
        path = Path(file)
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as data:
            while piece := data.read(2**20):
                digest.update(piece)
                size += len(piece)
        name = digest.hexdigest()
        try:
            _document(self._send("GET", f"/v1/models/{name}", {}))
        except RequestRejected as rejection:
            if rejection.problem.get("status") != 404:
                raise
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with path.open("rb") as data:
                _document(self._send("PUT", f"/v1/models/{name}", headers, lambda: _replayable_body(data)))
        return f"sha256:{name}"

    def verdict(self, name: str) -> bytes:
        """Return the signed verdict of a result id; `mtlsign.service.auth.signing.read_verdict` checks it."""
        return self._send("GET", f"/v1/verdicts/{name}", {}).data

    def keys(self) -> list[str]:
        """Return the public keys (hex) that sign verdicts. Compare them with the ledger before use."""
        return [key["public_key"] for key in _document(self._send("GET", "/v1/keys", {}))["keys"]]

    def ledger_head(self) -> dict[str, Any]:
        """Return the newest confirmed checkpoint of the ledger."""
        return _document(self._send("GET", "/v1/ledger/head", {}))

    def _send(
        self, method: str, path: str, headers: Mapping[str, str], body: Callable[[], Any] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """Send a request until it is answered. Raises RequestRejected, ClusterError."""
        end, pause = time.monotonic() + self.timeout_s, 0.2
        all_headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json", **headers}
        while True:
            wait = pause
            try:
                answer = self._pool.request(
                    method, self.url + path, headers=all_headers, body=body() if body else None,
                    redirect=False, preload_content=False,
                )  # fmt: skip
                data = answer.read(MAX_ANSWER + 1)
                if len(data) > MAX_ANSWER:
                    message = "The answer is over 64 MiB. Send fewer claims in one request."
                    raise ClusterError(message, field="service")
                if answer.status < 300:
                    return urllib3.HTTPResponse(data, status=answer.status, headers=answer.headers)
                if answer.status not in _RETRY_STATUSES and not _is_proxy_error(answer):
                    raise RequestRejected(_problem(answer.status, data))
                reason = f"answers with status {answer.status}"
                retry_after = answer.headers.get("Retry-After", "")
                wait = max(pause, min(float(retry_after), 60.0)) if retry_after.isdigit() else pause
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = f"cannot be reached ({type(error).__name__})"
            if time.monotonic() + wait > end:
                message = f"{self.url} {reason}. Check the address, or try later."
                raise ClusterError(message, field="service")
            time.sleep(wait * random.uniform(0.7, 1.3))
            pause = min(2 * pause, 5.0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _replayable_body(data: IO[bytes]) -> Iterator[bytes]:
    """Yield a file from its start, so that a retry sends all of it."""
    data.seek(0)
    while piece := data.read(2**20):
        yield piece


def _is_proxy_error(answer: urllib3.BaseHTTPResponse) -> bool:
    """Return whether a 500 is the proxy's: the process with the request crashed. A retry is idempotent."""
    kind = answer.headers.get("Content-Type", "")
    return answer.status == 500 and not kind.startswith("application/problem+json")


def _document(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(answer.data)
    return document


def _problem(status: int, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if isinstance(document, dict):
        return document
    return {"title": f"HTTP {status}", "detail": "", "status": status}
