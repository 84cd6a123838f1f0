"""Failures of the environment: full disk, hanging ledger, busy verifiers. Answers come in time."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from mtlsign.errors import StorageError
from mtlsign.service import state as state_module
from mtlsign.service.http.body_limits import proxy_middlewares
from mtlsign.service.verifier.verifier import VerificationTask
from tests.unit.service.fakes import FakeServeHandle
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, assert_problem, fill_disk, sign_in


def test_full_disk_returns_503_until_space_is_free(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service()
    headers, database = service.headers(), service.state.database
    sign_in(service)
    fill_disk(database)
    claim = claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "head": "x" * 500_000})
    refused = service.verify(claim, headers=headers)
    assert_problem(refused, "busy")
    assert int(refused.headers["retry-after"]) >= 1 and "disk" not in refused.text
    fields = {"model": claim_fixtures.location(), "bundle": json.dumps(claim["bundle"])}
    answer = service.client.post("/checks", data=fields, headers={"Accept": "text/html"})
    assert answer.status_code == 503 and "<h1" in answer.text
    database.fetch_all("PRAGMA max_page_count=1000000")
    assert service.verify(claim_fixtures.claim(), headers=headers).status_code == 200
    assert service.client.get("/readyz").status_code == 200


def test_readyz_with_unwritable_database_returns_503(start_service: ServiceFactory) -> None:
    service = start_service()
    service.state.database.fetch_all("PRAGMA query_only=ON")
    with pytest.raises(sqlite3.OperationalError):
        service.state.database.check_writable()
    answer = service.client.get("/readyz")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    service.state.database.fetch_all("PRAGMA query_only=OFF")
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_ray_serve_verifier_busy_is_ready_and_checks_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    from mtlsign.distributed import serve_verifier

    async def hang() -> None:
        await asyncio.sleep(3600)

    async def run() -> None:
        handle = FakeServeHandle()
        verifier = serve_verifier.RayServeVerifier(handle)  # type: ignore[arg-type]
        assert [await verifier.ready() for _ in range(5)] == [True] * 5 and handle.calls == 1
        monkeypatch.setattr(serve_verifier, "FRESH_S", -1.0)
        handle.answer = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        assert await verifier.ready()
        handle.answer = DeploymentUnavailableError(None)
        assert not await verifier.ready()
        handle.answer = hang
        assert not await verifier.ready()  # no replica has ever answered
        handle.answer = "an answer"
        await verifier.verify(VerificationTask("m", None, ()))
        handle.answer = hang
        assert not await verifier.ready()  # no task is running
        task = asyncio.create_task(verifier.verify(VerificationTask("m", None, ())))
        await asyncio.sleep(0)
        assert await verifier.ready()
        task.cancel()

    asyncio.run(run())


def test_keys_with_hanging_or_missing_ledger_are_still_listed(
    start_service: ServiceFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    service = start_service(ledger=f"sqlite:///{tmp_path}/secret-folder/ledger.db")
    get, ledger = service.client.get, service.state.ledger
    assert ledger is not None
    (key,) = get("/v1/keys").json()["keys"]
    assert key["entry"] is None and key["current"]
    answer = get("/v1/ledger/head", headers=service.headers("ledger"))
    assert_problem(answer, "ledger")
    assert "secret-folder" not in answer.text and "secret-folder" in caplog.text
    monkeypatch.setattr(state_module, "LEDGER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(state_module, "FRESH_S", -1.0)
    monkeypatch.setattr(ledger, "first_entry_of_key", lambda _: time.sleep(2))
    begin = time.monotonic()
    assert get("/v1/keys").json()["keys"][0]["entry"] is None
    assert get("/healthz").status_code == 200 and time.monotonic() - begin < 1.5


def test_keys_are_looked_up_once_per_interval(
    start_service: ServiceFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, calls = start_service(ledger=f"sqlite:///{tmp_path}/l.db"), []
    monkeypatch.setattr(
        service.state.ledger, "first_entry_of_key", lambda keys: calls.append(keys) or {keys[0]: 7}
    )
    assert [service.client.get("/v1/keys").json()["keys"][0]["entry"] for _ in range(4)] == [7] * 4
    assert len(calls) == 1


def test_unreachable_bucket_hides_internal_address(
    start_service: ServiceFactory,
    claim_fixtures: ClaimFixtures,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise StorageError("http://10.1.2.3:8333 does not answer; set AWS_ACCESS_KEY_ID")

    monkeypatch.setattr("mtlsign.service.fetch.model_cache.open_storage", unreachable)
    answer = start_service(allowed_locations=["s3://bucket"]).verify(
        claim_fixtures.claim("s3://bucket/m.safetensors")
    )
    (result,) = answer.json()["results"]
    assert result["problem"]["type"].endswith("unreachable")
    assert "10.1" not in answer.text and "AWS" not in answer.text and "AWS_ACCESS_KEY_ID" in caplog.text


def test_log_contains_token_id_and_counts_refused_bodies(
    start_service: ServiceFactory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    service = start_service(max_body_mb=1)
    headers = service.headers("ledger")
    service.client.get("/v1/ledger/head", headers=headers)  # 404: no ledger here
    service.client.post("/v1/verifications", content=b"{}", headers=headers)  # 403: another scope
    sign_in(service)
    service.client.get("/")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtlsign.service"]
    token_ids = [line.get("token") for line in lines if line["event"] == "request"]
    assert token_ids[:2] == [headers["Authorization"].split("_")[1]] * 2 and len(token_ids[-1] or "") == 12
    big = {**headers, "Content-Type": "application/json", "Content-Length": str(10**9)}
    assert service.client.post("/v1/verifications", content=b"{}", headers=big).status_code == 413
    assert service.state.metrics.sums["mtlsign_refusals", "too-large"] == 1  # type: ignore[attr-defined]
    monkeypatch.setattr("mtlsign.service.metrics.configure_logging", lambda: None)
    (middleware,) = proxy_middlewares()
    caplog.clear()
    middleware.kwargs["count"]("too-large")
    assert json.loads(caplog.records[-1].getMessage()) == {"event": "body_refused", "reason": "too-large"}
