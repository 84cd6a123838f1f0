"""A full disk, a ledger that hangs, busy verifiers: 503, in time, and no word of the operator's machines."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from test_service_interface import problem  # type: ignore[import-not-found]
from test_service_page import enter  # type: ignore[import-not-found]

from mtlsign.errors import LedgerError, StorageError
from mtlsign.service import state as offices
from mtlsign.service.database import Database
from mtlsign.service.http.body_limits import proxy_middlewares
from mtlsign.service.problems import problem_from_error
from mtlsign.service.verifier.verifier import VerificationTask
from tests.unit.service.fixtures import Goods, Start


def fill(store: Database) -> None:
    """No page more, as on a full disk."""
    ((pages,),) = store.rows("PRAGMA page_count")
    store.rows(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_is_a_503(start: Start, goods: Goods, caplog: pytest.LogCaptureFixture) -> None:
    service = start()
    headers, store = service.headers(), service.office.store
    enter(service)
    fill(store)
    heavy = goods.claim(bundle={**goods.right, "head": "x" * 500_000})
    refused = service.ask(heavy, headers=headers)
    problem(refused, "busy")
    assert int(refused.headers["retry-after"]) >= 1 and "disk" not in refused.text
    fields = {"model": goods.pointer(), "bundle": json.dumps(heavy["bundle"])}
    answer = service.client.post("/checks", data=fields, headers={"Accept": "text/html"})
    assert answer.status_code == 503 and "<h1" in answer.text
    store.rows("PRAGMA max_page_count=1000000")
    assert service.ask(goods.claim(), headers=headers).status_code == 200
    assert service.client.get("/readyz").status_code == 200


def test_a_file_that_cannot_be_written_is_not_ready(start: Start) -> None:
    service = start()
    service.office.store.rows("PRAGMA query_only=ON")
    with pytest.raises(sqlite3.OperationalError):
        service.office.store.try_out()
    answer = service.client.get("/readyz")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    service.office.store.rows("PRAGMA query_only=OFF")
    assert service.client.get("/readyz").status_code == 200


class Handle:
    """A handle on verifying replicas, as Ray gives it."""

    def __init__(self) -> None:
        self.asked, self.alive, self.verify = 0, self, self
        self.says: Any = True

    def options(self, **_: Any) -> Handle:
        return self

    async def remote(self, *_: Any) -> Any:
        self.asked += 1
        if isinstance(self.says, Exception):
            raise self.says
        return await self.says() if callable(self.says) else self.says


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_busy_is_ready_and_the_question_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    from mtlsign.distributed import serve

    async def silent() -> None:
        await asyncio.sleep(3600)

    async def play() -> None:
        handle = Handle()
        replicas = serve.RayServeVerifier(handle)  # type: ignore[arg-type]
        assert [await replicas.ready() for _ in range(5)] == [True] * 5 and handle.asked == 1
        monkeypatch.setattr(serve, "FRESH_S", -1.0)
        handle.says = BackPressureError(num_queued_requests=1, max_queued_requests=1)
        assert await replicas.ready()
        handle.says = DeploymentUnavailableError(None)
        assert not await replicas.ready()
        handle.says = silent
        assert not await replicas.ready()  # nobody has ever answered
        handle.says = "an answer"
        await replicas.verify(VerificationTask("m", None, ()))
        handle.says = silent
        assert not await replicas.ready()  # nothing is under way
        task = asyncio.create_task(replicas.verify(VerificationTask("m", None, ())))
        await asyncio.sleep(0)
        assert await replicas.ready()
        task.cancel()

    asyncio.run(play())


def test_a_ledger_that_hangs_or_is_gone_leaves_the_keys(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service = start(ledger=f"sqlite:///{tmp_path}/secret-place/ledger.db")
    get, desk = service.client.get, service.office.ledger
    assert desk is not None
    (key,) = get("/v1/keys").json()["keys"]
    assert key["entry"] is None and key["current"]
    gone = get("/v1/ledger/head", headers=service.headers("ledger"))
    problem(gone, "ledger")
    assert "secret-place" not in gone.text and "secret-place" in caplog.text
    monkeypatch.setattr(offices, "LEDGER_S", 0.2)
    monkeypatch.setattr(offices, "FRESH_S", -1.0)
    monkeypatch.setattr(desk, "first_of", lambda _: time.sleep(2))
    begin = time.monotonic()
    assert get("/v1/keys").json()["keys"][0]["entry"] is None
    assert get("/healthz").status_code == 200 and time.monotonic() - begin < 1.5


def test_keys_are_looked_up_once_in_some_seconds(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, asked = start(ledger=f"sqlite:///{tmp_path}/l.db"), []
    monkeypatch.setattr(service.office.ledger, "first_of", lambda keys: asked.append(keys) or {keys[0]: 7})
    assert [service.client.get("/v1/keys").json()["keys"][0]["entry"] for _ in range(4)] == [7] * 4
    assert len(asked) == 1


def test_callers_see_nothing_of_the_operator_s_machines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    inside = "http://10.1.2.3:8333 refused, set AWS_SECRET_ACCESS_KEY or look at /srv/ledger.db"
    for error in (StorageError(inside), LedgerError(inside)):
        for about in ("model", "bundle", "ledger"):
            found = problem_from_error(error, about=about)
            assert found.kind in ("unreachable", "ledger") and "10.1" not in found.detail
            assert "AWS" not in found.detail and "/srv" not in found.detail
    assert inside in caplog.text


def test_a_bucket_that_cannot_be_reached_says_no_more(
    start: Start, goods: Goods, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise StorageError("http://10.1.2.3:8333 does not answer; set AWS_ACCESS_KEY_ID")

    monkeypatch.setattr("mtlsign.service.fetch.model_cache.open_storage", unreachable)
    answer = start(allow="s3://bucket").ask(goods.claim("s3://bucket/m.safetensors"))
    (result,) = answer.json()["results"]
    assert result["problem"]["type"].endswith("unreachable")
    assert "10.1" not in answer.text and "AWS" not in answer.text and "AWS_ACCESS_KEY_ID" in caplog.text


def test_the_log_names_the_token_and_refused_bodies_count(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    service = start(max_body_mb=1)
    headers = service.headers("ledger")
    service.client.get("/v1/ledger/head", headers=headers)  # 404: no ledger here
    service.client.post("/v1/verifications", content=b"{}", headers=headers)  # 403: another scope
    enter(service)
    service.client.get("/")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtlsign.service"]
    named = [line.get("token") for line in lines if line["event"] == "request"]
    assert named[:2] == [headers["Authorization"].split("_")[1]] * 2 and named[-1] and len(named[-1]) == 12
    big = {**headers, "Content-Type": "application/json", "Content-Length": str(10**9)}
    assert service.client.post("/v1/verifications", content=b"{}", headers=big).status_code == 413
    assert service.office.metrics.sums["mtlsign_refusals", "too-large"] == 1  # type: ignore[attr-defined]
    monkeypatch.setattr("mtlsign.service.metrics.configure_logging", lambda: None)
    (middleware,) = proxy_middlewares()
    caplog.clear()
    middleware.kwargs["count"]("too-large")
    assert json.loads(caplog.records[-1].getMessage()) == {"event": "refused", "reason": "too-large"}
