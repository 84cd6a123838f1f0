"""Claims in, verdicts out: order, neighbours, durability, idempotency, isolation, pressure."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ClaimError
from mtlsign.service.auth.signing import read_verdict
from mtlsign.service.problems import Problem
from mtlsign.service.queue.fair_semaphore import FairSemaphore
from mtlsign.service.verifier.verifier import VerificationBatchResult, VerificationTask, VerifierCrashed
from tests.unit.service.fixtures import Goods, Service, Start


def kinds(answer: Any) -> list[str]:
    return [
        r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2]
        for r in answer.json()["results"]
    ]


def test_results_in_order_and_a_bad_claim_fails_no_neighbour(service: Service, goods: Goods) -> None:
    bad_reference = {**goods.right, "reference": base64.b64encode(b"other").decode()}
    claims = [
        goods.claim(), goods.claim(bundle=goods.wrong), {"model": 5}, None, goods.claim(bundle=bad_reference),
        goods.claim("file:///etc/passwd"), goods.claim(), goods.claim(bundle={**goods.right, "kit": "x"}),
        {**goods.claim(), "sha256": "00" * 32},
    ]  # fmt: skip
    answer = service.ask(*claims)
    assert answer.status_code == 200, answer.text
    assert kinds(answer) == [
        "accepted", "rejected", "bad-claim", "bad-claim", "bad-bundle", "pointer-refused", "accepted",
        "kit-refused", "wrong-digest",
    ]  # fmt: skip
    first = answer.json()["results"][0]["verdict"]
    assert first["model_digest"] == goods.digest and first["n"] == 128 and first["bits_required"] == 120
    assert first.keys() >= {"matches", "accuracy", "p_value", "evidence_bits", "controls", "near_zero"}
    assert service.verifier.library.downloads == 1 and len(service.verifier._suspects) == 1


def test_claims_on_one_model_share_download_and_load(service: Service, goods: Goods) -> None:
    service.ask(goods.claim(), goods.claim(bundle=goods.wrong))
    (suspect,) = service.verifier._suspects.values()
    loads = suspect.loads
    assert 0 < loads < len(suspect)  # only what is tapped is ever read
    service.ask(*[goods.claim() for _ in range(5)])
    assert service.verifier.library.downloads == 1 and suspect.loads == loads


def test_a_verdict_is_signed_and_says_what_was_answered(service: Service, goods: Goods) -> None:
    headers = service.headers()
    result = service.ask(goods.claim(), headers=headers).json()["results"][0]
    answer = service.client.get(f"/v1/verdicts/{result['id']}", headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(
        "application/vnd.in-toto+json"
    )
    key = service.client.get("/v1/keys").json()["keys"][0]["public_key"]
    said = read_verdict(answer.content, trusted=[key])
    assert said["suspect"] == goods.digest and said["status"] == "accepted" and said["key"] == result["key"]
    assert said["matches"] == result["verdict"]["matches"] and said["millibits"] > 120_000
    with pytest.raises(ClaimError):
        read_verdict(answer.content, trusted=["00" * 32])
    envelope = json.loads(answer.content)
    payload = base64.b64decode(envelope["payload"]).replace(b'"accepted"', b'"rejected"')
    envelope["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(ClaimError):
        read_verdict(json.dumps(envelope, separators=(",", ":")).encode())


def test_another_token_sees_nothing(service: Service, goods: Goods) -> None:
    mine, theirs = service.headers(), service.headers()
    answer = service.ask(goods.claim(), headers=mine).json()
    for path in (f"/v1/verifications/{answer['id']}", f"/v1/verdicts/{answer['results'][0]['id']}"):
        assert service.client.get(path, headers=mine).status_code == 200
        refused = service.client.get(path, headers=theirs)
        assert refused.status_code == 404 and refused.json()["type"].endswith("not-found")


def test_idempotency_is_per_token_and_per_body(service: Service, goods: Goods) -> None:
    mine = service.headers(**{"Idempotency-Key": "k1"})
    first = service.ask(goods.claim(), headers=mine).json()
    assert service.ask(goods.claim(), headers=mine).json()["id"] == first["id"]
    assert service.ask(goods.claim(bundle=goods.wrong), headers=mine).status_code == 409
    other = service.headers(**{"Idempotency-Key": "k1"})
    assert service.ask(goods.claim(), headers=other).json()["id"] != first["id"]


class Slow:
    """A backend that a test holds back; it may lose tasks."""

    def __init__(self, lose: int = 0) -> None:
        self.go = asyncio.Event()
        self.tasks: list[VerificationTask] = []
        self.lose = lose
        self.poison: str | None = None

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        self.tasks.append(task)
        if self.lose or (
            self.poison and any(self.poison.encode() in (q.bundle or b"") for q in task.questions)
        ):
            self.lose -= bool(self.lose)
            raise VerifierCrashed
        await self.go.wait()
        verdict = {
            "status": "rejected", "matches": 1, "n": 128, "evidence_bits": 0.0, "bits_required": 120.0,
            "near_zero": 0, "statistic": "count", "reason": None, "model_digest": "00" * 32,
        }  # fmt: skip
        return VerificationBatchResult(
            [{"verdict": verdict, "key": "00" * 32, "claim": None} for _ in task.questions]
        )

    async def ready(self) -> bool:
        return self.go.is_set()


def test_later_answers_and_a_process_that_died(start: Start, goods: Goods) -> None:
    slow = Slow()
    service = start(backend=slow)
    headers = service.headers(**{"Idempotency-Key": "once"})
    answer = service.ask(goods.claim(), headers=headers, wait_s=0)
    assert answer.status_code == 202 and answer.json()["results"] == [None]
    assert answer.headers["location"] == f"/v1/verifications/{answer.json()['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    store = service.office.store
    (sealed,) = store.rows("SELECT sealed FROM claims")[0]
    raw = Path(store.rows("PRAGMA database_list")[0][2])
    signature = goods.right["opening"]["signature"].encode()
    for place in raw.parent.glob("service.sqlite*"):
        assert signature not in place.read_bytes()
    assert signature in service.office.keys.unseal(sealed)
    service.client.__exit__(None, None, None)  # the process dies with the claim unanswered
    store.change("UPDATE jobs SET lease=0")
    again = start()
    again.client.headers.update(headers)
    end = time.monotonic() + 20
    while (found := again.client.get(answer.headers["location"])).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert kinds(found) == ["accepted"]
    assert again.office.store.rows("SELECT sealed FROM claims") == []  # wiped once answered
    service.client.__enter__()


def test_lost_verifiers_are_the_service_s_matter(start: Start, goods: Goods) -> None:
    slow = Slow(lose=1)
    slow.go.set()
    service = start(backend=slow)
    answer = service.ask(*[goods.claim() for _ in range(3)])
    assert kinds(answer) == ["rejected"] * 3 and [len(t.questions) for t in slow.tasks] == [3, 3]


def test_a_claim_that_kills_verifiers_takes_none_along(start: Start, goods: Goods) -> None:
    slow = Slow()
    slow.go.set()
    slow.poison = "poison"
    service = start(backend=slow, attempts=1)
    answer = service.ask(goods.claim(), goods.claim(bundle={"poison": 1}), goods.claim())
    assert kinds(answer) == ["rejected", "verifier-lost", "rejected"]


def test_backpressure_comes_before_memory_suffers(start: Start, goods: Goods) -> None:
    service = start(backend=Slow(), queue_claims=3, token_claims=2)
    one, two = service.headers(), service.headers()
    assert service.ask(goods.claim(), goods.claim(), headers=one, wait_s=0).status_code == 202
    refused = service.ask(goods.claim(), headers=one, wait_s=0)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    refused = service.ask(goods.claim(), goods.claim(), headers=two, wait_s=0)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert service.ask(goods.claim(), headers=two, wait_s=0).status_code == 202
    ready = service.client.get("/readyz")
    assert ready.status_code == 503 and ready.headers["retry-after"]
    assert service.client.get("/healthz").status_code == 200


def test_rotation_keeps_old_verdicts_and_sealed_requests(start: Start, goods: Goods, tmp_path: Path) -> None:
    from mtlsign.watermark.keys.identity import Identity

    old = start(backend=Slow())
    headers = old.headers()
    place = old.ask(goods.claim(), headers=headers, wait_s=0).headers["location"]
    old.client.__exit__(None, None, None)
    old.office.store.change("UPDATE jobs SET lease=0")
    Identity.generate().save(tmp_path / "new.json", None)
    new = start(identity=tmp_path / "new.json", former=str(tmp_path / "state" / "identity.json"))
    end = time.monotonic() + 20
    while (found := new.client.get(place, headers=headers)).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert kinds(found) == ["accepted"]
    listed = new.client.get("/v1/keys").json()["keys"]
    assert [one["current"] for one in listed] == [True, False]
    envelope = new.client.get(f"/v1/verdicts/{found.json()['results'][0]['id']}", headers=headers).content
    assert read_verdict(envelope)["signer"] == listed[0]["public_key"]
    old.client.__enter__()


def test_problems_survive_pickling() -> None:
    import pickle

    problem = pickle.loads(pickle.dumps(Problem("busy", "later", retry_after=3, more=1)))
    assert problem.document()["more"] == 1 and problem.retry_after == 3 and problem.status == 503


class Dying(Slow):
    """A backend that tells outcomes and then dies at one claim, `times` times."""

    def __init__(self, at: str, times: int) -> None:
        super().__init__()
        self.go.set()
        self.at, self.times = at.encode(), times

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        answer = await super().verify(task)
        for i, question in enumerate(task.questions):
            if self.times and self.at in (question.bundle or b""):
                self.times -= 1
                raise VerifierCrashed(answer.outcomes[:i], begun=True) if task.careful else VerifierCrashed()
        return answer


def test_what_was_told_before_a_death_is_kept_and_only_the_guilty_is_alone(
    start: Start, goods: Goods
) -> None:
    claims = [goods.claim(), goods.claim(bundle={"guilty": 1}), goods.claim(), goods.claim()]
    for deaths, asked in ((1, [4, 4]), (2, [4, 4, 2, 1])):
        dying = Dying("guilty", deaths)
        assert kinds(start(backend=dying, state=f"a{deaths}").ask(*claims)) == ["rejected"] * 4
        assert [len(t.questions) for t in dying.tasks] == asked
    dying = Dying("guilty", 10**9)
    answer = start(backend=dying, state="b").ask(*claims)
    assert kinds(answer) == ["rejected", "verifier-lost", "rejected", "rejected"]
    assert [len(t.questions) for t in dying.tasks] == [4, 4, 2, 1, 1]  # all deaths are its, nobody else's


def test_a_full_disk_puts_a_request_down_and_it_is_taken_up_again(
    start: Start, goods: Goods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 0.3)
    service = start()
    keep, failures = service.office.store.keep, [OSError("disk full"), OSError("disk full")]

    def sometimes(*args: Any) -> None:
        if failures:
            raise failures.pop()
        keep(*args)

    monkeypatch.setattr(service.office.store, "keep", sometimes)
    headers = service.headers()
    answer = service.ask(goods.claim(), headers=headers, wait_s=0)
    end = time.monotonic() + 20
    while answer.json()["state"] != "done":
        assert time.monotonic() < end
        time.sleep(0.05)
        answer = service.client.get(f"/v1/verifications/{answer.json()['id']}", headers=headers)
    assert kinds(answer) == ["accepted"] and not failures


def test_bytes_that_wait_are_bounded_too(start: Start, goods: Goods) -> None:
    service = start(backend=Slow(), token_mb=1, queue_mb=2)
    heavy = goods.claim(bundle={**goods.right, "head": "x" * 700_000})
    codes = []
    for _ in range(3):
        headers = service.headers()
        codes += [service.ask(heavy, headers=headers, wait_s=0).status_code for _ in range(2)]
    assert codes == [202, 429, 202, 429, 503, 503]


def test_tokens_take_turns() -> None:
    async def play() -> list[str]:
        turns, order = FairSemaphore(1), []

        async def one(name: str) -> None:
            async with turns.of(name):
                order.append(name)
                await asyncio.sleep(0)

        async with turns.of("holder"):
            greedy = [asyncio.create_task(one("greedy")) for _ in range(6)]
            await asyncio.sleep(0)
            modest = [asyncio.create_task(one("modest")) for _ in range(2)]
            await asyncio.sleep(0)
            greedy[5].cancel()
        await asyncio.gather(*greedy, *modest, return_exceptions=True)
        async with asyncio.timeout(1), turns.of("later"):
            order.append("later")
        return order

    order = asyncio.run(play())
    assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy", "later"]


def test_a_claim_over_its_time_ends_without_its_verifier(start: Start, goods: Goods) -> None:
    service = start(claim_s=1e-9)
    assert kinds(service.ask(goods.claim())) == ["too-long"]
    assert service.verifier.busy_since is None
    service.verifier.settings = ServiceSettings.of({"state": service.office.settings.state, "claim_s": 60})
    assert kinds(service.ask(goods.claim())) == ["accepted"]
