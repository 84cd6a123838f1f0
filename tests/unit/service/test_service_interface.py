"""The door: tokens and scopes, bodies of every bad kind, uploads, the ledger, the log, OpenAPI."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_service_verifications import Slow  # type: ignore[import-not-found]

from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.merkle import verify_inclusion
from mtlsign.claims.owner import Owner, create_ledger
from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth import tokens
from mtlsign.service.http.body_limits import BodyLimitMiddleware, release_body
from mtlsign.service.problems import KINDS, MEDIA
from mtlsign.watermark.keys.identity import Identity
from tests.unit.service.fixtures import Goods, Service, Start

BODY = {"claims": [{}], "wait_s": 0}


def problem(answer: Any, kind: str) -> None:
    assert answer.headers["content-type"] == MEDIA, answer.text
    document = answer.json()
    assert document["type"] == f"urn:mtlsign:problem:{kind}" and document["status"] == answer.status_code
    assert answer.status_code == KINDS[kind][0] and document["detail"]


def test_tokens_and_scopes(service: Service) -> None:
    post, store = service.client.post, service.office.store
    problem(post("/v1/verifications", json=BODY), "unauthenticated")
    for text in ("", "x", "Basic abc", "Bearer mtls_", "Bearer " + "a" * 5000):
        problem(post("/v1/verifications", json=BODY, headers={"Authorization": text}), "unauthenticated")
    good = service.token("ledger")
    nearly = good[:-1] + ("0" if good[-1] != "0" else "1")
    problem(
        post("/v1/verifications", json=BODY, headers={"Authorization": f"Bearer {nearly}"}), "unauthenticated"
    )
    problem(post("/v1/verifications", json=BODY, headers={"Authorization": f"Bearer {good}"}), "forbidden")
    old = service.headers("verify")
    store.change("UPDATE tokens SET expires=0 WHERE scopes='verify'")
    problem(post("/v1/verifications", json=BODY, headers=old), "unauthenticated")
    admin = service.headers("admin")
    problem(service.client.get("/v1/tokens", headers=service.headers("verify")), "forbidden")
    made = post("/v1/tokens", json={"name": "new", "scopes": ["verify"]}, headers=admin)
    assert made.status_code == 201
    new = {"Authorization": f"Bearer {made.json()['token']}"}
    assert post("/v1/verifications", json=BODY, headers=new).status_code in (200, 202)
    problem(post("/v1/tokens", json={"name": "n", "scopes": ["root"]}, headers=admin), "malformed-request")
    assert service.client.delete(f"/v1/tokens/{made.json()['id']}", headers=admin).status_code == 204
    problem(post("/v1/verifications", json=BODY, headers=new), "unauthenticated")
    listed = service.client.get("/v1/tokens", headers=admin).text
    everything = b"".join(p.read_bytes() for p in Path(service.office.settings.state).glob("service.sqlite*"))
    for text in (good, made.json()["token"], admin["Authorization"][7:]):
        assert text not in listed and text.encode() not in everything  # stored as hashes only


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "malformed-request"), (b"{", "malformed-request"), (b"[]", "malformed-request"),
        (b"\xff\xfe{}", "malformed-request"), (b'{"claims": NaN}', "malformed-request"),
        (b'{"claims": [], "claims": []}', "malformed-request"), (b'{"claims": []}', "malformed-request"),
        (b'{"claims": {}}', "malformed-request"), (b'{"claims": [1], "x": 1}', "malformed-request"),
        (b'{"claims": [1], "wait_s": -1}', "malformed-request"),
        (b'{"claims": [1], "wait_s": 1e999}', "malformed-request"),
        (b'{"claims": [1], "wait_s": true}', "malformed-request"),
        (json.dumps({"claims": [1] * 257}).encode(), "malformed-request"),
        (b'{"claims": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "malformed-request"),
        (b'{"claims": "' + b"x" * (2 * 2**20) + b'"}', "too-large"),
    ],
)  # fmt: skip
def test_bad_bodies(start: Start, body: bytes, kind: str) -> None:
    service = start(max_body_mb=1)
    headers = service.headers(**{"Content-Type": "application/json"})
    problem(service.client.post("/v1/verifications", content=body, headers=headers), kind)


def test_a_body_is_refused_by_its_announcement_and_other_kinds_at_once(service: Service) -> None:
    headers = service.headers(**{"Content-Type": "application/json", "Content-Length": str(10**9)})
    problem(service.client.post("/v1/verifications", content=b"{}", headers=headers), "too-large")
    headers = service.headers(**{"Content-Type": "application/xml"})
    problem(service.client.post("/v1/verifications", content=b"<x/>", headers=headers), "wrong-media-type")
    headers = service.headers(**{"Content-Type": "application/json", "Content-Encoding": "gzip"})
    problem(service.client.post("/v1/verifications", content=b"x", headers=headers), "wrong-media-type")
    problem(service.client.get("/v1/nothing"), "not-found")
    problem(service.client.patch("/v1/verifications"), "wrong-method")
    problem(service.client.get("/v1/verifications/../../x", headers=service.headers()), "not-found")


def run_limits(messages: Any, settings: ServiceSettings, proxy: bool = False) -> int:
    """The status that the middleware gives to a body; the app behind it reads everything and says 200."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    seen: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    async def go() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/verifications", "headers": []}
        await BodyLimitMiddleware(app, settings, proxy)(scope, messages(), send)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert len(seen) == 1  # one answer, whatever the app says after it
    return seen[0]


def test_endless_and_dripping_bodies_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServiceSettings.of({"state": tmp_path, "max_body_mb": 1, "body_s": 0.5})

    def stream(size: int, pause: float, last: int = 10**9) -> Any:
        def make() -> Any:
            count = 0

            async def receive() -> Any:
                nonlocal count
                count += 1
                await asyncio.sleep(pause)
                return {"type": "http.request", "body": b"x" * size, "more_body": count < last}

            return receive

        return make

    assert (
        run_limits(stream(100_000, 0), settings)
        == run_limits(stream(100_000, 0), settings, proxy=True)
        == 413
    )
    assert run_limits(stream(1, 0.05), settings) == 408
    assert run_limits(stream(1, 100), settings) == 408
    assert run_limits(stream(100, 0, 3), settings) == 200
    monkeypatch.setattr("mtlsign.service.http.body_limits.GRACE_S", 0.1)
    assert run_limits(stream(1, 0.05), ServiceSettings.of({"state": tmp_path, "body_s": 100})) == 408


def run_proxy(app: Any) -> tuple[int, dict[bytes, bytes]]:
    """What a stranger gets through the proxy's middleware when `app` is Ray's handling of a request."""
    seen: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        seen.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/verifications", "headers": []}
    asyncio.run(BodyLimitMiddleware(app, ServiceSettings.of({}), proxy=True)(scope, receive, send))
    return seen[0]["status"], dict(seen[0]["headers"])


def test_an_ingress_that_dies_is_a_503_with_retry_after() -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:  # what Ray's proxy does then
        await receive()

    async def unavailable(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"x")]})

    for app in (nothing, unavailable):
        status, headers = run_proxy(app)
        assert status == 503 and int(headers[b"retry-after"]) >= 1


def test_the_interface_is_described_without_a_stranger_s_script(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200 and "POST /v1/verifications" in page.text and "kit-refused" in page.text
    assert "<script" not in page.text and "://" not in page.text.replace("s3://BUCKET", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_uploads(start: Start, goods: Goods) -> None:
    service = start(max_model_mb=1, upload_quota_mb=1)
    mine, theirs = service.headers(), service.headers()
    put = service.client.put
    path = f"/v1/models/{goods.digest}"
    problem(put(path, content=goods.marked[:-1], headers=mine), "wrong-digest")
    problem(put("/v1/models/..%2f..%2fx", content=b"x", headers=mine), "not-found")
    problem(put("/v1/models/" + "AB" * 32, content=b"x", headers=mine), "malformed-request")
    problem(put(path, content=b"x" * (2**20 + 1), headers=mine), "too-large")
    pointer = f"sha256:{goods.digest}"
    assert service.ask(goods.claim(pointer), headers=mine).json()["results"][0]["problem"]["status"] == 404
    made = put(path, content=goods.marked, headers=mine)
    assert made.status_code == 201 and made.json()["model"] == pointer
    assert service.client.get(path, headers=mine).status_code == 200
    problem(service.client.get(path, headers=theirs), "not-found")
    problem(put(path, content=b"wrong bytes", headers=theirs), "wrong-digest")  # and gains nothing by it:
    assert service.ask(goods.claim(pointer), headers=theirs).json()["results"][0]["problem"]["status"] == 404
    assert (
        service.ask(goods.claim(pointer), headers=mine).json()["results"][0]["verdict"]["status"]
        == "accepted"
    )
    other = b"y" * (2**20 - 10)
    problem(put(f"/v1/models/{hashlib.sha256(other).hexdigest()}", content=other, headers=mine), "quota")
    service.office.store.change("UPDATE uploads SET expires=1")
    problem(service.client.get(path, headers=mine), "not-found")
    assert service.office.store.clean(1e9) == set()
    os.utime(service.office.shelf.path(goods.digest), (0, 0))
    service.office.shelf.sweep(set())
    assert not service.office.shelf.has(goods.digest)
    assert not [p for p in service.office.shelf.folder.iterdir() if p.name.startswith(".part")]


def test_the_ledger_is_read_and_names_the_signing_key(start: Start, tmp_path: Path, owner: Identity) -> None:
    uri = f"sqlite:///{tmp_path}/ledger.db"
    with open_ledger(uri, create=True) as ledger:
        create_ledger(Owner(owner, ledger, tmp_path / "memory.json"), [owner.public_key])
    service = start(ledger=uri, announce=True)
    headers = service.headers("ledger")
    get = service.client.get
    key = get("/v1/keys").json()["keys"][0]
    assert key["entry"] == 1 and key["public_key"] == service.office.keys.current.public_key.hex()
    head = get("/v1/ledger/head", headers=headers).json()
    assert head["entries"] == 2 and head["counted"]
    entry = get("/v1/ledger/entries/1", headers=headers).json()
    assert entry["kind"] == "register" and entry["signers"] == [key["public_key"]]
    proof = get("/v1/ledger/proofs/1?size=2", headers=headers).json()
    leaf, path, root = bytes.fromhex(proof["leaf"]), [bytes.fromhex(p) for p in proof["path"]], proof["root"]
    assert verify_inclusion(leaf, 1, 2, path, bytes.fromhex(root)) and proof["leaf"] == entry["leaf"]
    for bad in (
        "entries/9",
        "entries/-1",
        "entries/x",
        "proofs/5",
        "proofs/1?size=99",
        "entries/99999999999999",
    ):
        problem(get(f"/v1/ledger/{bad}", headers=headers), "not-found")
    problem(get("/v1/ledger/head", headers=service.headers("verify")), "forbidden")
    problem(get("/v1/ledger/head"), "unauthenticated")


def test_without_a_ledger_there_is_none(service: Service) -> None:
    problem(service.client.get("/v1/ledger/head", headers=service.headers("ledger")), "not-found")


def test_the_log_says_who_asked_what_and_no_secret(
    service: Service, goods: Goods, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = service.headers("verify")
    service.ask(goods.claim(), goods.claim("https://secret.example.org/x"), headers=headers)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtlsign.service"]
    accepted = next(line for line in lines if line["event"] == "accepted")
    assert accepted["token"] == headers["Authorization"].split("_")[1] and accepted["claims"] == 2
    assert {
        "event": "request",
        "method": "POST",
        "route": "/v1/verifications",
        "status": 200,
    }.items() <= next(line for line in lines if line["event"] == "request").items()
    whole = "\n".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records)
    secrets = [headers["Authorization"][7:], goods.right["opening"]["signature"], "secret.example.org"]
    assert not [s for s in secrets if s in whole]
    figures = service.office.metrics.sums  # type: ignore[attr-defined]
    assert figures["mtlsign_answers", "accepted"] == 1 and figures["mtlsign_refusals", "pointer-refused"] == 1


def test_openapi_describes_every_route(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            if path.startswith("/v1/") and path != "/v1/keys":
                assert "401" in said["responses"] and said["security"], (path, method)
    assert "/v1/verifications" in document["paths"] and "/" not in document["paths"]


def test_a_token_names_no_more_than_it_may(service: Service) -> None:
    assert tokens.SCOPES == ("verify", "ledger", "admin")
    text = service.token("verify", "ledger")
    assert tokens.check(service.office.store, text).scopes == {"verify", "ledger"}


def crowd(
    settings: ServiceSettings, proxy: bool, *bodies: tuple[str, int, bool], waits: bool = False
) -> list[int]:
    """Statuses of bodies (peer, bytes, whether they end) that come one after another and stay; 0: none yet.

    `waits`: the app has read the body, says so, and keeps its answer.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        release_body(scope)
        await asyncio.sleep(3600 if waits else 0)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def play() -> list[int]:
        limits, found, tasks = BodyLimitMiddleware(app, settings, proxy), [0] * len(bodies), []
        for i, (peer, size, ends) in enumerate(bodies):
            messages = [{"type": "http.request", "body": b"x" * size, "more_body": not ends}]

            async def receive(messages: Any = messages) -> Any:
                return messages.pop() if messages else await asyncio.sleep(3600)

            async def send(message: Any, i: int = i) -> None:
                found[i] = message.get("status", found[i])

            scope = {
                "type": "http", "method": "POST", "path": "/v1/verifications", "client": (peer, 1),
                "headers": [(b"transfer-encoding", b"chunked")],
            }  # fmt: skip
            tasks.append(asyncio.create_task(limits(scope, receive, send)))
            for _ in range(10):
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limits.held == 0 and not limits.shares
        return found

    return asyncio.run(play())


def test_four_connections_lock_nobody_out(tmp_path: Path) -> None:
    settings = ServiceSettings.of({"state": tmp_path, "max_body_mb": 1})
    large = 2**20 - 100
    for proxy in (False, True):
        held = [("10.0.0.1", large, False)] * 2
        assert crowd(settings, proxy, *held, ("10.0.0.1", large, True), ("10.0.0.2", large, True)) == [
            0,
            0,
            503,
            200,
        ]
        held += [("10.0.0.3", large, False)] * 2
        assert crowd(settings, proxy, *held, ("10.0.0.2", large, True), ("10.0.0.2", 9000, True))[4:] == [
            503,
            200,
        ]
        many = [(f"10.0.1.{i}", large, True) for i in range(8)]
        assert (
            crowd(settings, proxy, *many, waits=True) == [0] * 8
        )  # all are taken in: what is parsed is not held


def test_a_claim_that_waits_for_its_answer_holds_no_body(start: Start, goods: Goods) -> None:
    service = start(backend=Slow(), max_body_mb=1)
    heavy, headers = goods.claim(bundle={**goods.right, "head": "x" * 900_000}), service.headers()
    with ThreadPoolExecutor(5) as pool:
        asked = []
        for count in range(1, 6):
            asked.append(pool.submit(service.ask, heavy, headers=headers, wait_s=4))
            while service.office.store.waiting() < count and not asked[-1].done():
                time.sleep(0.02)
        assert [one.result().status_code for one in asked] == [202] * 5
