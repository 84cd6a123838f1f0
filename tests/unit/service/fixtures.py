"""Shared helpers of the service's tests: opened claims on a marked model, and a service in this process."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from mtlsign.service.auth import tokens
from mtlsign.service.database import Database
from mtlsign.service.fetch.locations import AllowedLocations
from mtlsign.service.problems import KINDS, MEDIA, Problem
from mtlsign.service.state import AppState
from mtlsign.service.verifier.claim_bundle import to_json
from mtlsign.service.verifier.verifier import Verifier
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec

ALLOWED = AllowedLocations.parse(
    [
        "file:///srv/models",
        "s3://good/pre",
        "https://models.example.org/a",
        "https://cdn.example.net:8443",
    ]
)


@dataclass
class ClaimFixtures:
    """Files below one allowed folder, and opened claims: of the marked model's key and of another key."""

    folder: Path
    right_bundle: dict[str, Any]
    wrong_bundle: dict[str, Any]
    digest: str
    model_bytes: bytes

    def write(self, name: str, data: bytes) -> str:
        """Write a file below the allowed folder and return its location."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return self.location(name)

    def location(self, name: str = "marked.safetensors") -> str:
        """Return the location of a file below the allowed folder."""
        return f"file://{self.folder}/{name}"

    def claim(self, model: str | None = None, bundle: Any = None) -> dict[str, Any]:
        """Return a claim; by default the right one on the marked model."""
        return {"model": model or self.location(), "bundle": bundle or self.right_bundle}

    def changed_bundle(self, owner: Identity, **changes: Any) -> dict[str, Any]:
        """Return the right bundle with changed fields of its spec, signed again."""
        spec = KeyOpening.from_json(json.dumps(self.right_bundle["opening"])).spec
        opening = sign_spec(owner, make_spec(**(json.loads(spec) | changes)))
        return to_json(opening, base64.b64decode(self.right_bundle["reference"]))


@dataclass
class ServiceHarness:
    """A running service and its HTTP client."""

    state: AppState
    client: TestClient
    verifier: Verifier

    def token(self, *scopes: str, name: str = "test client", hours: float = 1) -> str:
        """Issue a token."""
        return tokens.issue(self.state.database, name, scopes or ("verify", "ledger"), hours)

    def headers(self, *scopes: str, **more: str) -> dict[str, str]:
        """Return headers with a new token."""
        return {"Authorization": f"Bearer {self.token(*scopes)}", **more}

    def verify(self, *claims: Any, headers: dict[str, str] | None = None, wait_s: float = 30) -> Any:
        """Send claims and return the HTTP response."""
        body = json.dumps({"claims": list(claims), "wait_s": wait_s})  # ASCII, also for lone surrogates
        all_headers = {"Content-Type": "application/json", **(headers or self.headers())}
        return self.client.post("/v1/verifications", content=body, headers=all_headers)


ServiceFactory = Callable[..., ServiceHarness]


@contextmanager
def limit_memory_and_time(mib: float = 200, seconds: float = 30) -> Iterator[None]:
    """Assert that the block ends in time and adds at most `mib` MiB to the peak memory of this process."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = read("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - begin < seconds
    assert read("VmHWM") - before < mib * 1024, f"grew by {(read('VmHWM') - before) / 1024:.0f} MiB"


@contextmanager
def serve_on_socket(service: ServiceHarness, **options: Any) -> Iterator[str]:
    """Serve on a loopback socket and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(
        service.client.app, host="127.0.0.1", port=port, lifespan="off", log_level="error", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def sign_in(service: ServiceHarness, *scopes: str) -> None:
    """Open a session in the client."""
    answer = service.client.post("/session", data={"token": service.token(*scopes)})
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie


def submit_form(service: ServiceHarness, fields: dict[str, str]) -> tuple[str, str]:
    """Submit the form of a claim; return address and text of its page once it is answered."""
    redirect = service.client.post("/checks", data=fields, headers={"Origin": "http://testserver"})
    assert redirect.status_code == 303
    address, end = redirect.headers["location"], time.monotonic() + 30
    while 'http-equiv="refresh"' in (page := service.client.get(address).text):
        assert time.monotonic() < end
        time.sleep(0.1)
    return address, page


def fill_disk(database: Database) -> None:
    """Make the database unable to grow, as on a full disk."""
    ((pages,),) = database.fetch_all("PRAGMA page_count")
    database.fetch_all(f"PRAGMA max_page_count={pages}")


def assert_problem(answer: Any, kind: str) -> None:
    """Assert that a response is a problem document of that kind."""
    assert answer.headers["content-type"] == MEDIA, answer.text
    document = answer.json()
    assert document["type"] == f"urn:mtlsign:problem:{kind}" and document["status"] == answer.status_code
    assert answer.status_code == KINDS[kind][0] and document["detail"]


def problem_kind(call: Callable[[], Any]) -> str:
    """Return the kind of the Problem that a call raises."""
    with pytest.raises(Problem) as caught:
        call()
    return caught.value.kind


def problem_type(result: Any) -> str:
    """Return the kind of a problem document, or of a result that has one."""
    document = result.get("problem", result)
    return str(document["type"]).rpartition(":")[2]


def result_status(result: Any) -> str:
    """Return the status of a result's verdict, or the kind of its problem."""
    return str(result["verdict"]["status"]) if "verdict" in result else problem_type(result)


def statuses(answer: Any) -> list[str]:
    """Return the status or problem kind of each result."""
    return [result_status(result) for result in answer.json()["results"]]
