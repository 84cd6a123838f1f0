"""A client of the verification service, for a laptop or notebook: submit, wait, upload, download, check.

    from mtlsign.client import Client, claim_of
    with Client("http://127.0.0.1:8000", token) as service:
        model = service.upload("suspect.safetensors")
        [result] = service.verify([claim_of(model, opening, reference)])

Every request is sent again after a lost connection or a 429, 502, 503 or 504, with an idempotency key, so
that no claim is answered twice and none is lost when the service's processes die.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

import urllib3

from mtlsign.errors import ClaimError, ClusterError, SettingsError
from mtlsign.watermark.keys.opening import KeyOpening

MAX_ANSWER = 64 * 2**20
_AGAIN = (429, 502, 503, 504)


class RequestRejected(ClaimError):
    """The service refused a request: `problem` is its RFC 9457 document."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{problem.get('title')}: {problem.get('detail')}", field="service")
        self.problem = dict(problem)


def make_claim(
    model: str, opening: KeyOpening, reference: bytes, *, head: bytes | None = None, claim: str | None = None
) -> dict[str, Any]:
    """One claim as the service takes it. The opening is secret until then, and spent afterwards."""
    from mtlsign.service.verifier.claim_bundle import to_json

    return {"model": model, "bundle": to_json(opening, reference, head, claim)}


class Client:
    """One service and one token.

    Args:
        url: `http://HOST:PORT` or `https://NAME`.
        token: what the operator gave out.
        patience_s: how long one call may take, all its repetitions together.
        ca: file of the authority's certificate, for a private one.
    """

    def __init__(self, url: str, token: str, *, patience_s: float = 600, ca: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise SettingsError("must be http://HOST:PORT or https://NAME", field="url")
        self.url, self._token, self.patience_s = url.rstrip("/"), token, patience_s
        timeout = urllib3.Timeout(connect=5, read=120)
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False, ca_certs=str(ca) if ca else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def __repr__(self) -> str:
        return f"Client({self.url!r}, token hidden)"

    def verify(self, claims: Sequence[Mapping[str, Any]], *, wait_s: float = 10) -> list[dict[str, Any]]:
        """One result for each claim, in order: {"verdict", "id", "key"} or {"problem"}.

        Raises: Refused when the whole request was refused, ClusterError when the service cannot be reached.
        """
        return self.wait(self.submit(claims, wait_s=wait_s))

    def submit(
        self, claims: Sequence[Mapping[str, Any]], *, wait_s: float = 10, key: str | None = None
    ) -> dict[str, Any]:
        """Send claims; the service's document, perhaps still running. `key`: the idempotency key."""
        body = json.dumps({"claims": list(claims), "wait_s": wait_s}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or secrets.token_hex(16)}
        return _document(self._send("POST", "/v1/verifications", headers, lambda: body))

    def wait(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The results of a submitted request, once all are there."""
        end, found = time.monotonic() + self.patience_s, dict(document)
        pause = 0.1
        while found["state"] != "done":
            if time.monotonic() > end:
                raise ClusterError(f"request {found['id']} is not answered yet; ask again", field="service")
            time.sleep(pause)
            pause = min(1.5 * pause, 2.0)
            found = _document(self._send("GET", f"/v1/verifications/{found['id']}", {}))
        results: list[dict[str, Any]] = found["results"]
        return results

    def upload(self, file: str | Path) -> str:
        """Send a model (or bundle) up and return the pointer that names it, `sha256:HEX`."""
        path = Path(file)
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as data:
            while piece := data.read(2**20):
                digest.update(piece)
                size += len(piece)
        name = digest.hexdigest()
        try:
            _document(self._send("GET", f"/v1/models/{name}", {}))
        except RequestRejected as refused:
            if refused.problem.get("status") != 404:
                raise
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with path.open("rb") as data:
                _document(self._send("PUT", f"/v1/models/{name}", headers, lambda: _replayable_body(data)))
        return f"sha256:{name}"

    def verdict(self, name: str) -> bytes:
        """The signed verdict of a result's id; `mtlsign.service.auth.signing.read_verdict` checks it."""
        return self._send("GET", f"/v1/verdicts/{name}", {}).data

    def keys(self) -> list[str]:
        """Public keys (hex) that sign verdicts here. Compare them with the ledger before you trust them."""
        return [one["public_key"] for one in _document(self._send("GET", "/v1/keys", {}))["keys"]]

    def ledger_head(self) -> dict[str, Any]:
        """The newest head that counts."""
        return _document(self._send("GET", "/v1/ledger/head", {}))

    def _send(
        self, method: str, path: str, headers: Mapping[str, str], body: Callable[[], Any] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """Send until there is an answer that is one. Raises Refused, ClusterError."""
        end, pause = time.monotonic() + self.patience_s, 0.2
        whole = {"Authorization": f"Bearer {self._token}", "Accept": "application/json", **headers}
        while True:
            wait, why = pause, ""
            try:
                answer = self._pool.request(
                    method, self.url + path, headers=whole, body=body() if body else None, redirect=False,
                    preload_content=False,
                )  # fmt: skip
                data = answer.read(MAX_ANSWER + 1)
                if len(data) > MAX_ANSWER:
                    raise ClusterError("the answer is over 64 MiB; ask for fewer claims", field="service")
                if answer.status < 300:
                    return urllib3.HTTPResponse(data, status=answer.status, headers=answer.headers)
                if answer.status not in _AGAIN and not _is_proxy_error(answer):
                    raise RequestRejected(_problem(answer.status, data))
                why = f"answers {answer.status}"
                given = answer.headers.get("Retry-After", "")
                wait = max(pause, min(float(given), 60.0)) if given.isdigit() else pause
            except (urllib3.exceptions.HTTPError, OSError) as error:
                why = f"cannot be reached ({type(error).__name__})"
            if time.monotonic() + wait > end:
                raise ClusterError(f"{self.url} {why}; check the address, or try later", field="service")
            time.sleep(wait * random.uniform(0.7, 1.3))
            pause = min(2 * pause, 5.0)


def _replayable_body(data: IO[bytes]) -> Iterator[bytes]:
    data.seek(0)
    while piece := data.read(2**20):
        yield piece


def _is_proxy_error(answer: urllib3.BaseHTTPResponse) -> bool:
    """A 500 that is not the service's own: the process with the request died. What we send is idempotent."""
    kind = answer.headers.get("Content-Type", "")
    return answer.status == 500 and not kind.startswith("application/problem+json")


def _document(answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.data)
    return found


def _problem(status: int, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"title": f"HTTP {status}", "detail": "", "status": status}
