"""Body limits: bytes, time, rate and memory of all bodies together."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.service.auth.request_tokens import TokenReader, token_id_of_request
from mtlsign.service.http.body_limits import BodyLimitMiddleware, release_body
from tests.unit.service.fakes import SlowBackend
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, ServiceHarness, serve_on_socket


def run_limits(messages: Any, settings: ServiceSettings, proxy: bool = False) -> int:
    """Return the status for a body. The application reads all of it and answers 200."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    codes: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            codes.append(message["status"])

    async def go() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/verifications", "headers": []}
        await BodyLimitMiddleware(app, settings, proxy)(scope, messages(), send)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert len(codes) == 1  # later messages of the application are dropped
    return codes[0]


def test_body_limits_with_endless_or_slow_body_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServiceSettings.of({"state_dir": tmp_path, "max_body_mb": 1, "body_timeout_s": 0.5})

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
    patient = ServiceSettings.of({"state_dir": tmp_path, "body_timeout_s": 100})
    assert run_limits(stream(1, 0.05), patient) == 408


def run_proxy(app: Any) -> tuple[int, dict[bytes, bytes]]:
    """Return status and headers of a response through the middleware in Ray's proxy."""
    messages: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/verifications", "headers": []}
    asyncio.run(BodyLimitMiddleware(app, ServiceSettings.of({}), proxy=True)(scope, receive, send))
    return messages[0]["status"], dict(messages[0]["headers"])


def test_proxy_without_ingress_answers_503_with_retry_after() -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:  # Ray's proxy without an ingress
        await receive()

    async def unavailable(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"x")]})

    for app in (nothing, unavailable):
        status, headers = run_proxy(app)
        assert status == 503 and int(headers[b"retry-after"]) >= 1


def run_concurrent_bodies(
    settings: ServiceSettings, proxy: bool, *bodies: tuple[str, int, bool], waits: bool = False,
    identify: Any = None,
) -> list[int]:  # fmt: skip
    """Return the statuses of bodies that arrive one after another and stay open; 0: no response yet.

    Args:
        settings: limits.
        proxy: run the middleware of Ray's proxy.
        bodies: (client address, bytes, whether the body ends).
        waits: the application releases the body and delays its response.
        identify: lookup of tokens; the Authorization header of a body is its client address.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        release_body(scope)
        await asyncio.sleep(3600 if waits else 0)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run() -> list[int]:
        limits = BodyLimitMiddleware(app, settings, proxy, identify=identify)
        codes, tasks = [0] * len(bodies), []
        for i, (address, size, ends) in enumerate(bodies):
            messages = [{"type": "http.request", "body": b"x" * size, "more_body": not ends}]

            async def receive(messages: Any = messages) -> Any:
                return messages.pop() if messages else await asyncio.sleep(3600)

            async def send(message: Any, i: int = i) -> None:
                codes[i] = message.get("status", codes[i])

            scope = {
                "type": "http", "method": "POST", "path": "/v1/verifications", "client": (address, 1),
                "headers": [(b"transfer-encoding", b"chunked"), (b"authorization", address.encode())],
            }  # fmt: skip
            tasks.append(asyncio.create_task(limits(scope, receive, send)))
            for _ in range(10):
                await asyncio.sleep(0 if identify is None else 0.005)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limits.held == 0 and not limits.shares
        return codes

    return asyncio.run(run())


def test_four_large_bodies_leave_memory_for_other_clients(tmp_path: Path) -> None:
    settings = ServiceSettings.of({"state_dir": tmp_path, "max_body_mb": 1})
    large = 2**20 - 100
    for proxy in (False, True):
        run = partial(run_concurrent_bodies, settings, proxy)
        held = [("10.0.0.1", large, False)] * 2
        assert run(*held, ("10.0.0.1", large, True), ("10.0.0.2", large, True)) == [0, 0, 503, 200]
        held += [("10.0.0.3", large, False)] * 2
        assert run(*held, ("10.0.0.2", large, True), ("10.0.0.2", 9000, True))[4:] == [503, 200]
        many = [(f"10.0.1.{i}", large, True) for i in range(8)]
        assert run(*many, waits=True) == [0] * 8  # parsed bodies do not count against the limit


def test_bodies_without_token_leave_all_memory_to_clients_with_token(tmp_path: Path) -> None:
    settings = ServiceSettings.of({"state_dir": tmp_path, "max_body_mb": 1})
    large = 2**20 - 100

    def identify(headers: Any) -> str | None:
        name = headers[b"authorization"].decode()
        return name if name.startswith("valid") else None

    for proxy in (False, True):
        run = partial(run_concurrent_bodies, settings, proxy, identify=identify)
        unfinished = [(f"attacker{i}", large, False) for i in range(4)]
        assert run(*unfinished, ("valid", large, True), ("none", 9000, True)) == [401] * 4 + [200, 200]
        held = [("valid1", large, False)] * 2
        assert run(*held, ("valid1", large, True), ("valid2", large, True)) == [0, 0, 503, 200]


def test_body_counts_by_address_if_tokens_cannot_be_read(tmp_path: Path) -> None:
    settings = ServiceSettings.of({"state_dir": tmp_path, "max_body_mb": 1})
    identify = partial(token_id_of_request, TokenReader(tmp_path / "missing"))
    held = [(f"Bearer mtls_{'0' * 12}_{'0' * 64}", 2**20 - 100, False)] * 3
    assert run_concurrent_bodies(settings, True, *held, identify=identify) == [0, 0, 503]


def test_service_refuses_large_body_without_token_before_it_arrives(service: ServiceHarness) -> None:
    with serve_on_socket(service) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        for path, expected in (("/v1/verifications", b" 401 "), ("/v1/models/" + "0" * 64, b" 401 "),
                               ("/checks", b" 303 ")):  # fmt: skip
            method = "PUT" if "models" in path else "POST"
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(head.encode() + b"x" * 100)
                assert expected in connection.recv(4096).partition(b"\r\n")[0]


def test_client_that_breaks_off_is_no_internal_error(
    service: ServiceHarness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="mtlsign.service")
    monkeypatch.setattr(logging.getLogger("mtlsign.service"), "propagate", True)
    with serve_on_socket(service) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        token = service.token()
        for path in ("/v1/verifications", "/session", "/v1/models/" + "0" * 64):
            method = "PUT" if "models" in path else "POST"
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            head += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 9000\r\n\r\n"
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(head.encode() + b"x" * 100)
                time.sleep(0.2)
        end = time.monotonic() + 10
        while caplog.text.count("client_disconnected") < 3 and time.monotonic() < end:
            time.sleep(0.05)
    assert caplog.text.count("client_disconnected") == 3, caplog.text
    assert "internal_error" not in caplog.text and "Traceback" not in caplog.text


def test_waiting_request_releases_memory_of_its_body(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    service = start_service(backend=SlowBackend(), max_body_mb=1)
    bundle = {**claim_fixtures.right_bundle, "head": "x" * 900_000}
    claim, headers = claim_fixtures.claim(bundle=bundle), service.headers()
    with ThreadPoolExecutor(5) as pool:
        requests = []
        for count in range(1, 6):
            requests.append(pool.submit(service.verify, claim, headers=headers, wait_s=4))
            while service.state.database.waiting_claims() < count and not requests[-1].done():
                time.sleep(0.02)
        assert [request.result().status_code for request in requests] == [202] * 5
