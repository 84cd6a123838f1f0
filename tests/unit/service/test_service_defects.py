"""What nobody thought of ends: no claim hangs its request, and a revoked token's requests are dropped."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
from test_service_verifications import Slow, kinds  # type: ignore[import-not-found]

from mtlsign.service.auth import tokens
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.verifier import VerificationBatchResult, VerificationTask
from tests.unit.service.fixtures import Goods, Service, Start

LONE = "\ud800"


def test_pointers_that_are_no_text_are_their_claims_problem(service: Service, goods: Goods) -> None:
    asked = [
        {"model": f"sha256:{LONE}", "bundle": {}}, goods.claim(LONE), goods.claim(bundle=f"sha256:{LONE}"),
        goods.claim(bundle=""), goods.claim(bundle={**goods.right, "claim": LONE}), goods.claim(),
    ]  # fmt: skip
    asked[3]["bundle"] = ""
    answer = service.ask(*asked)
    assert answer.status_code == 200
    assert kinds(answer) == ["bad-claim"] * 4 + ["bad-bundle", "accepted"]


def test_a_problem_with_half_a_character_can_be_sent() -> None:
    assert Problem("internal", f"about {LONE}").document()["detail"] == "about ?"


class Odd(Slow):
    """A backend with a defect; every question counts as one try."""

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        self.tasks.append(task)
        raise KeyError("a defect")


def test_a_backend_with_a_defect_ends_in_a_problem(
    start: Start, goods: Goods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.job_queue.PAUSE_S", 0.001)
    odd = Odd()
    service = start(backend=odd, attempts=2)
    answer = service.ask(goods.claim(), goods.claim())
    assert kinds(answer) == ["internal"] * 2 and len(odd.tasks) < 20


@pytest.mark.parametrize("place", ["_not_theirs", "_work"])
def test_a_defect_of_the_desk_ends_in_a_problem(
    start: Start, goods: Goods, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.1)

    def broken(*_: Any) -> None:
        raise KeyError("a defect")

    service = start(attempts=2)
    monkeypatch.setattr(service.office.desk, place, broken)
    answer = service.ask(goods.claim(), goods.claim())
    assert kinds(answer) == ["internal"] * 2 and not service.office.store.waiting()
    assert service.office.store.rows("SELECT * FROM claims") == []


def test_an_outcome_that_cannot_be_signed_is_a_problem(
    start: Start, goods: Goods, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    slow.go.set()
    service = start(backend=slow)
    monkeypatch.setattr(service.office.keys, "sign", lambda *_: {}["a defect"])  # type: ignore[misc]
    assert kinds(service.ask(goods.claim())) == ["internal"]


def test_a_request_that_could_not_be_put_down_is_taken_up_again(
    start: Start, goods: Goods, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full both for the outcome and for putting the request down."""
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.3)
    service = start()
    store, left = service.office.store, {"keep": 1, "put_down": 1}

    def full(name: str) -> Any:
        real = getattr(store, name)

        def call(*args: Any) -> Any:
            left[name] -= 1
            if left[name] >= 0:
                raise OSError("disk full")
            return real(*args)

        return call

    for name in left:
        monkeypatch.setattr(store, name, full(name))
    assert kinds(service.ask(goods.claim())) == ["accepted"]
    gc.collect()  # when asyncio would tell, with a traceback, of an exception that nobody took
    assert "never retrieved" not in caplog.text


def test_a_revoked_token_s_open_requests_are_dropped(start: Start, goods: Goods) -> None:
    slow = Slow()
    service = start(backend=slow, queue_claims=2)
    mine, theirs = service.headers(), service.headers()
    assert (
        service.ask(goods.claim(), goods.claim(goods.pointer("x")), headers=mine, wait_s=0).status_code == 202
    )
    assert service.ask(goods.claim(), headers=theirs, wait_s=0).status_code == 503
    store = service.office.store
    assert tokens.revoke(store, mine["Authorization"].split("_")[1])
    assert store.waiting() == 0 and store.rows("SELECT * FROM claims") == []
    assert service.ask(goods.claim(), headers=theirs, wait_s=0).status_code == 202
    slow.go.set()
    end = time.monotonic() + 10
    while store.waiting():
        assert time.monotonic() < end
        time.sleep(0.02)
