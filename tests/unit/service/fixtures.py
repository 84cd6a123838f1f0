"""What the service's tests share: a marked model with its opened claims, and a service in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from mtlsign.service.auth import tokens
from mtlsign.service.state import AppState
from mtlsign.service.verifier.verifier import Verifier


@dataclass
class Goods:
    """Files below one allowed folder, and opened claims."""

    folder: Path
    right: dict[str, Any]
    wrong: dict[str, Any]
    digest: str
    marked: bytes

    def put(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return self.pointer(name)

    def pointer(self, name: str = "marked.safetensors") -> str:
        return f"file://{self.folder}/{name}"

    def claim(self, model: str | None = None, bundle: Any = None) -> dict[str, Any]:
        return {"model": model or self.pointer(), "bundle": bundle or self.right}


@dataclass
class Service:
    """A running service and how to talk to it."""

    office: AppState
    client: TestClient
    verifier: Verifier

    def token(self, *scopes: str, name: str = "somebody", hours: float = 1) -> str:
        return tokens.issue(self.office.store, name, scopes or ("verify", "ledger"), hours)

    def headers(self, *scopes: str, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(*scopes)}", **more}

    def ask(self, *claims: Any, headers: dict[str, str] | None = None, wait_s: float = 30) -> Any:
        body = json.dumps({"claims": list(claims), "wait_s": wait_s})  # ASCII: also what is no text
        whole = {"Content-Type": "application/json", **(headers or self.headers())}
        return self.client.post("/v1/verifications", content=body, headers=whole)


@contextmanager
def bounded(mib: float = 200, seconds: float = 30) -> Iterator[None]:
    """What happens within ends in time and never takes `mib` MiB more of our memory than before."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, begin = read("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - begin < seconds
    assert read("VmHWM") - before < mib * 1024, f"grew by {(read('VmHWM') - before) / 1024:.0f} MiB"


Start = Callable[..., Service]
