"""Queue: order, durability, idempotency, limits, crash handling and revocation."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import pytest

from mtlsign.service.auth import tokens
from tests.unit.service.fakes import CrashingBackend, SlowBackend
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, ServiceHarness, statuses


def test_verify_mixed_claims_returns_results_in_order_and_isolates_bad_claims(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    right = claim_fixtures.claim()
    bad_reference = {**claim_fixtures.right_bundle, "reference": base64.b64encode(b"other").decode()}
    claims = [
        right, claim_fixtures.claim(bundle=claim_fixtures.wrong_bundle), {"model": 5}, None,
        claim_fixtures.claim(bundle=bad_reference), claim_fixtures.claim("file:///etc/passwd"), right,
        claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "kit": "x"}),
        {**right, "sha256": "00" * 32},
    ]  # fmt: skip
    answer = service.verify(*claims)
    assert answer.status_code == 200, answer.text
    assert statuses(answer) == [
        "accepted", "rejected", "bad-claim", "bad-claim", "bad-bundle", "pointer-refused", "accepted",
        "kit-refused", "wrong-digest",
    ]  # fmt: skip
    first = answer.json()["results"][0]["verdict"]
    assert (
        first["model_digest"] == claim_fixtures.digest and first["n"] == 128 and first["bits_required"] == 120
    )
    assert first.keys() >= {"matches", "accuracy", "p_value", "evidence_bits", "controls", "near_zero"}
    assert service.verifier.fetcher.downloads == 1 and len(service.verifier._suspects) == 1


def test_results_of_another_token_are_not_found(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    mine, theirs = service.headers(), service.headers()
    answer = service.verify(claim_fixtures.claim(), headers=mine).json()
    for path in (f"/v1/verifications/{answer['id']}", f"/v1/verdicts/{answer['results'][0]['id']}"):
        assert service.client.get(path, headers=mine).status_code == 200
        refused = service.client.get(path, headers=theirs)
        assert refused.status_code == 404 and refused.json()["type"].endswith("not-found")


def test_idempotency_key_repeated_returns_same_request_per_token_and_body(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    mine = service.headers(**{"Idempotency-Key": "k1"})
    first = service.verify(claim_fixtures.claim(), headers=mine).json()
    assert service.verify(claim_fixtures.claim(), headers=mine).json()["id"] == first["id"]
    assert (
        service.verify(claim_fixtures.claim(bundle=claim_fixtures.wrong_bundle), headers=mine).status_code
        == 409
    )
    other = service.headers(**{"Idempotency-Key": "k1"})
    assert service.verify(claim_fixtures.claim(), headers=other).json()["id"] != first["id"]


def test_request_of_crashed_process_is_continued_and_its_claims_deleted(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    backend = SlowBackend()
    service = start_service(backend=backend)
    headers = service.headers(**{"Idempotency-Key": "once"})
    answer = service.verify(claim_fixtures.claim(), headers=headers, wait_s=0)
    assert answer.status_code == 202 and answer.json()["results"] == [None]
    assert answer.headers["location"] == f"/v1/verifications/{answer.json()['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    database = service.state.database
    (encrypted,) = database.fetch_all("SELECT sealed FROM claims")[0]
    path = Path(database.fetch_all("PRAGMA database_list")[0][2])
    signature = claim_fixtures.right_bundle["opening"]["signature"].encode()
    for file in path.parent.glob("service.sqlite*"):
        assert signature not in file.read_bytes()
    assert signature in service.state.keys.decrypt(encrypted)
    service.client.__exit__(None, None, None)  # the process ends with the claim unanswered
    database.execute("UPDATE jobs SET lease=0")
    successor = start_service()
    successor.client.headers.update(headers)
    end = time.monotonic() + 20
    while (answered := successor.client.get(answer.headers["location"])).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert statuses(answered) == ["accepted"]
    assert successor.state.database.fetch_all("SELECT sealed FROM claims") == []  # deleted once answered
    service.client.__enter__()


def test_verifier_crash_once_is_retried_as_one_group(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    backend = SlowBackend(crashes=1)
    backend.go.set()
    service = start_service(backend=backend)
    answer = service.verify(*[claim_fixtures.claim() for _ in range(3)])
    assert statuses(answer) == ["rejected"] * 3 and [len(t.claims) for t in backend.tasks] == [3, 3]


def test_claim_that_crashes_verifiers_fails_alone(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    backend = SlowBackend()
    backend.go.set()
    backend.poison = "poison"
    service = start_service(backend=backend, max_attempts=1)
    answer = service.verify(
        claim_fixtures.claim(), claim_fixtures.claim(bundle={"poison": 1}), claim_fixtures.claim()
    )
    assert statuses(answer) == ["rejected", "verifier-lost", "rejected"]


def test_crash_with_progress_keeps_earlier_outcomes_and_retries_suspect_alone(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    claims = [
        claim_fixtures.claim(),
        claim_fixtures.claim(bundle={"marker": 1}),
        claim_fixtures.claim(),
        claim_fixtures.claim(),
    ]
    for crashes, sizes in ((1, [4, 4]), (2, [4, 4, 2, 1])):
        backend = CrashingBackend("marker", crashes)
        assert (
            statuses(start_service(backend=backend, state_dir=f"a{crashes}").verify(*claims))
            == ["rejected"] * 4
        )
        assert [len(t.claims) for t in backend.tasks] == sizes
    backend = CrashingBackend("marker", 10**9)
    answer = start_service(backend=backend, state_dir="b").verify(*claims)
    assert statuses(answer) == ["rejected", "verifier-lost", "rejected", "rejected"]
    assert [len(t.claims) for t in backend.tasks] == [4, 4, 2, 1, 1]  # every crash is attributed to it


def test_submit_over_claim_limits_returns_429_or_503(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    service = start_service(backend=SlowBackend(), max_queued_claims=3, max_queued_claims_per_token=2)
    first, second = service.headers(), service.headers()
    assert (
        service.verify(claim_fixtures.claim(), claim_fixtures.claim(), headers=first, wait_s=0).status_code
        == 202
    )
    refused = service.verify(claim_fixtures.claim(), headers=first, wait_s=0)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    refused = service.verify(claim_fixtures.claim(), claim_fixtures.claim(), headers=second, wait_s=0)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert service.verify(claim_fixtures.claim(), headers=second, wait_s=0).status_code == 202
    ready = service.client.get("/readyz")
    assert ready.status_code == 503 and ready.headers["retry-after"]
    assert service.client.get("/healthz").status_code == 200


def test_submit_over_byte_limits_returns_429_or_503(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    service = start_service(backend=SlowBackend(), max_queued_mb_per_token=1, max_queued_mb=2)
    heavy = claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "head": "x" * 700_000})
    codes = []
    for _ in range(3):
        headers = service.headers()
        codes += [service.verify(heavy, headers=headers, wait_s=0).status_code for _ in range(2)]
    assert codes == [202, 429, 202, 429, 503, 503]


def test_full_disk_while_saving_releases_request_and_retries_it(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.3)
    service = start_service()
    save, failures = service.state.database.save_results, [OSError("disk full"), OSError("disk full")]

    def save_after_failures(*args: Any) -> None:
        if failures:
            raise failures.pop()
        save(*args)

    monkeypatch.setattr(service.state.database, "save_results", save_after_failures)
    headers = service.headers()
    answer = service.verify(claim_fixtures.claim(), headers=headers, wait_s=0)
    end = time.monotonic() + 20
    while answer.json()["state"] != "done":
        assert time.monotonic() < end
        time.sleep(0.05)
        answer = service.client.get(f"/v1/verifications/{answer.json()['id']}", headers=headers)
    assert statuses(answer) == ["accepted"] and not failures


def test_revoked_token_closes_its_open_requests(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    backend = SlowBackend()
    service = start_service(backend=backend, max_queued_claims=2)
    mine, theirs = service.headers(), service.headers()
    assert (
        service.verify(
            claim_fixtures.claim(), claim_fixtures.claim(claim_fixtures.location("x")), headers=mine, wait_s=0
        ).status_code
        == 202
    )
    assert service.verify(claim_fixtures.claim(), headers=theirs, wait_s=0).status_code == 503
    database = service.state.database
    assert tokens.revoke(database, mine["Authorization"].split("_")[1])
    assert database.waiting_claims() == 0 and database.fetch_all("SELECT * FROM claims") == []
    assert service.verify(claim_fixtures.claim(), headers=theirs, wait_s=0).status_code == 202
    backend.go.set()
    end = time.monotonic() + 10
    while database.waiting_claims():
        assert time.monotonic() < end
        time.sleep(0.02)
