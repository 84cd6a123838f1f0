"""One service in this process: a marked model, its opened claim, its own store, an in-process verifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from mtlsign.config.service import ServiceSettings
from mtlsign.service.app import make_app
from mtlsign.service.state import AppState
from mtlsign.service.verifier.claim_bundle import to_json
from mtlsign.service.verifier.verifier import InProcessVerifier, Verifier, VerifierBackend
from mtlsign.storage.model_folder import model_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import sign_spec
from mtlsign.watermark.keys.spec import make_spec
from tests.unit.service.fixtures import Goods, Service, Start


def opened(kit: Any) -> dict[str, Any]:
    return to_json(kit.opening, kit.reference, kit.head)


@pytest.fixture(scope="session")
def goods(marked: Any, owner: Identity, tmp_path_factory: pytest.TempPathFactory) -> Goods:
    _, done = marked
    kit = done.kit
    fields = json.loads(kit.opening.spec)
    fields["nonce"] = "11" * 32
    other = to_json(sign_spec(owner, make_spec(**fields)), kit.reference)
    data = model_bytes(done.tensors)
    found = Goods(
        tmp_path_factory.mktemp("goods"), opened(kit), other, hashlib.sha256(data).hexdigest(), data
    )
    found.put("marked.safetensors", data)
    return found


@pytest.fixture
def start(tmp_path: Path, goods: Goods) -> Iterator[Start]:
    """Start a service; settings, `backend` and the fetching parts may be overridden."""
    running: list[TestClient] = []

    def make(
        *, backend: VerifierBackend | None = None, resolver: Any = None, transport: Any = None, state: str = "state",
        **settings: Any,
    ) -> Service:  # fmt: skip
        s = ServiceSettings.of({"state": tmp_path / state, "allow": f"file://{goods.folder}", **settings})
        more = {k: v for k, v in (("resolver", resolver), ("transport", transport)) if v is not None}
        verifier = Verifier(s, **more)
        office = AppState.open(s, backend or InProcessVerifier(verifier))
        app: FastAPI = make_app(office)
        client = TestClient(
            app, base_url="http://testserver", follow_redirects=False, raise_server_exceptions=False
        )
        client.__enter__()
        running.append(client)
        return Service(office, client, verifier)

    yield make
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture
def service(start: Start) -> Service:
    return start()
