"""Unexpected exceptions: every request still ends, with a problem for each affected claim."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests.unit.service.fakes import FaultyBackend, SlowBackend
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, ServiceHarness, statuses

LONE_SURROGATE = "\ud800"


def test_locations_with_lone_surrogates_are_problems_of_their_claims(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    claims = [
        {"model": f"sha256:{LONE_SURROGATE}", "bundle": {}},
        claim_fixtures.claim(LONE_SURROGATE),
        claim_fixtures.claim(bundle=f"sha256:{LONE_SURROGATE}"),
        claim_fixtures.claim() | {"bundle": ""},
        claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "claim": LONE_SURROGATE}),
        claim_fixtures.claim(),
    ]
    answer = service.verify(*claims)
    assert answer.status_code == 200
    assert statuses(answer) == ["bad-claim"] * 4 + ["bad-bundle", "accepted"]


def test_backend_with_unexpected_exception_gives_internal_problem(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.group_verifier.PAUSE_S", 0.001)
    backend = FaultyBackend()
    service = start_service(backend=backend, max_attempts=2)
    answer = service.verify(claim_fixtures.claim(), claim_fixtures.claim())
    assert statuses(answer) == ["internal"] * 2 and len(backend.tasks) < 20


@pytest.mark.parametrize("method", ["_unauthorized_upload", "_process"])
def test_queue_with_unexpected_exception_gives_internal_problem(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.1)

    def fail(*_: Any) -> None:
        raise KeyError("an unexpected exception")

    service = start_service(max_attempts=2)
    monkeypatch.setattr(service.state.queue, method, fail)
    answer = service.verify(claim_fixtures.claim(), claim_fixtures.claim())
    assert statuses(answer) == ["internal"] * 2 and not service.state.database.waiting_claims()
    assert service.state.database.fetch_all("SELECT * FROM claims") == []


def test_outcome_that_cannot_be_signed_gives_internal_problem(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SlowBackend()
    backend.go.set()
    service = start_service(backend=backend)
    monkeypatch.setattr(service.state.keys, "sign", lambda *_: {}["missing"])  # type: ignore[misc]
    assert statuses(service.verify(claim_fixtures.claim())) == ["internal"]


def test_request_that_cannot_be_released_is_retried(
    start_service: ServiceFactory,
    claim_fixtures: ClaimFixtures,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk is full both when the outcome is saved and when the request is released."""
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.3)
    service = start_service()
    database, failures = service.state.database, {"save_results": 1, "release": 1}

    def full(name: str) -> Any:
        original = getattr(database, name)

        def call(*args: Any) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                raise OSError("disk full")
            return original(*args)

        return call

    for name in failures:
        monkeypatch.setattr(database, name, full(name))
    assert statuses(service.verify(claim_fixtures.claim())) == ["accepted"]
    gc.collect()  # asyncio logs unretrieved exceptions when their task is collected
    assert "never retrieved" not in caplog.text
