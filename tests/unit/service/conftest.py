"""Fixtures of the service's tests: claims on a marked model, and services with an in-process verifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, ServiceHarness


@pytest.fixture(scope="session")
def claim_fixtures(
    marked_model: Any, owner: Identity, tmp_path_factory: pytest.TempPathFactory
) -> ClaimFixtures:
    _, result = marked_model
    kit = result.kit
    fields = json.loads(kit.opening.spec) | {"nonce": "11" * 32}
    data = model_bytes(result.tensors)
    fixtures = ClaimFixtures(
        folder=tmp_path_factory.mktemp("models"),
        right_bundle=to_json(kit.opening, kit.reference, kit.head),
        wrong_bundle=to_json(sign_spec(owner, make_spec(**fields)), kit.reference),
        digest=hashlib.sha256(data).hexdigest(),
        model_bytes=data,
    )
    fixtures.write("marked.safetensors", data)
    return fixtures


@pytest.fixture
def start_service(tmp_path: Path, claim_fixtures: ClaimFixtures) -> Iterator[ServiceFactory]:
    """Start services; settings, the backend and the parts that fetch can be overridden."""
    running: list[TestClient] = []

    def start(
        *, backend: VerifierBackend | None = None, resolver: Any = None, transport: Any = None,
        state_dir: str = "state", **changes: Any,
    ) -> ServiceHarness:  # fmt: skip
        allowed = [f"file://{claim_fixtures.folder}"]
        values = {"state_dir": tmp_path / state_dir, "allowed_locations": allowed, **changes}
        settings = ServiceSettings.of(values)
        parts = {k: v for k, v in (("resolver", resolver), ("transport", transport)) if v is not None}
        verifier = Verifier(settings, **parts)
        state = AppState.open(settings, backend or InProcessVerifier(verifier))
        client = TestClient(
            make_app(state), base_url="http://testserver", follow_redirects=False,
            raise_server_exceptions=False,
        )  # fmt: skip
        client.__enter__()
        running.append(client)
        return ServiceHarness(state, client, verifier)

    yield start
    for client in running:
        client.__exit__(None, None, None)


@pytest.fixture
def service(start_service: ServiceFactory) -> ServiceHarness:
    return start_service()
