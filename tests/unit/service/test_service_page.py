"""The page: without a browser what it promises, with real Chromium what a person sees."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mtlsign.service.verifier.verifier import InProcessVerifier, VerificationBatchResult, VerificationTask
from mtlsign.service.web.charts import matches_needed, null_distribution_svg
from tests.helpers import chromium_driver
from tests.unit.service.fixtures import Goods, Service, Start


def enter(service: Service, *scopes: str) -> None:
    answer = service.client.post("/session", data={"token": service.token(*scopes)})
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie


def test_the_page_is_shut_without_a_token(service: Service) -> None:
    fresh = service.client.get("/")
    assert fresh.status_code == 200 and 'type="password"' in fresh.text
    policy = fresh.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "<script" not in fresh.text and "style=" not in fresh.text
    wrong = service.client.post("/session", data={"token": "mtls_nonsense"})
    assert wrong.status_code == 401 and "mtls_nonsense" not in wrong.text and 'role="alert"' in wrong.text
    for path in ("/checks/" + "0" * 32, "/ledger", f"/verdicts/{'0' * 32}.0"):
        assert service.client.get(path).headers["location"] == "/"
    assert service.client.post("/checks", data={"model": "x", "bundle": "y"}).headers["location"] == "/"


def test_forms_of_other_sites_are_refused(service: Service) -> None:
    enter(service)
    for headers in (
        {"Origin": "https://evil.example.org"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
    ):
        answer = service.client.post("/checks", data={"model": "x", "bundle": "y"}, headers=headers)
        assert answer.status_code == 403
    secure = service.client.post("/session", content=b"token=x", headers={"Content-Type": "text/plain"})
    assert secure.status_code == 415


def test_a_claim_from_form_to_signed_verdict(service: Service, goods: Goods) -> None:
    enter(service)
    fields = {"model": goods.pointer(), "bundle": json.dumps(goods.right)}
    led = service.client.post("/checks", data=fields, headers={"Origin": "http://testserver"})
    assert led.status_code == 303
    page = service.client.get(led.headers["location"])
    assert "Accepted" in page.text and "<svg" in page.text and "evidence" in page.text.lower()
    link = page.text.split('href="/verdicts/')[1].split('"')[0]
    envelope = service.client.get(f"/verdicts/{link}")
    assert envelope.headers["content-disposition"].startswith("attachment") and envelope.json()["signatures"]
    bad = service.client.post("/checks", data={"model": "<b>x", "bundle": "{nope"})
    assert bad.status_code == 422 and "<b>x" not in bad.text and "&lt;b&gt;x" in bad.text
    service.client.post("/leave", data={"": ""})
    assert service.client.get(led.headers["location"]).headers["location"] == "/"


def test_the_picture_is_right_and_plain() -> None:
    assert matches_needed(1024, 120) == 712 and matches_needed(600, 120) == 452
    assert matches_needed(64, 120) is None
    for matches in (0, 512, 1024):
        svg = null_distribution_svg(matches, 1024, 712)
        assert (
            f"found {matches:,}" in svg and "needed 712" in svg and "style=" not in svg and "nan" not in svg
        )


@contextmanager
def served(service: Service, **options: Any) -> Iterator[str]:
    """The service behind a real socket on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(
        service.client.app, host="127.0.0.1", port=port, lifespan="off", log_level="error", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


class Held(InProcessVerifier):
    """Answers only when told, so that one can look while a claim is being verified."""

    def __init__(self, verifier: Any) -> None:
        super().__init__(verifier)
        self.go = threading.Event()

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        import asyncio

        await asyncio.to_thread(self.go.wait, 60)
        return await super().verify(task)


@pytest.mark.skipif(
    chromium_driver.BINARY is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
@pytest.mark.parametrize("script", [True, False], ids=["as it comes", "without scripts"])
def test_a_person_with_a_keyboard(start: Start, goods: Goods, tmp_path: Path, script: bool) -> None:
    from mtlsign.config.service import ServiceSettings
    from mtlsign.service.verifier.verifier import Verifier

    shots = Path(os.environ.get("MTLSIGN_TEST_PICTURES", tmp_path / "pictures"))
    settings = ServiceSettings.of({"state": tmp_path / "state", "allow": f"file://{goods.folder}"})
    held = Held(Verifier(settings))
    service = start(backend=held)

    def look(name: str) -> None:
        for width in (1200, 380):
            if script:
                tab.picture(shots / f"{name}-{width}.png", width)
            wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, (name, width)  # nothing sticks out to the side

    with served(service) as url, chromium_driver.Browser(tmp_path / "profile") as tab:
        tab.send("Emulation.setScriptExecutionDisabled", value=not script)
        tab.go(url + "/")
        look("fresh")
        tab.type(service.token())  # the field has the focus
        tab.key("Enter")
        tab.until("document.querySelector('#bundle') !== null")
        tab.settle()
        look("home")
        tab.type(goods.pointer())
        tab.key("Tab")
        tab.type(json.dumps(goods.right))
        tab.key("Tab")
        tab.key("Enter")
        tab.until("document.querySelector('[role=status]') !== null")
        look("while")
        held.go.set()
        tab.until("document.querySelector('.good .badge') !== null")  # the page looks again by itself
        assert tab.evaluate("document.querySelector('svg.null').getBoundingClientRect().width") > 200
        look("accepted")
        for name, bundle, wanted in (
            ("rejected", json.dumps(goods.wrong), ".bad .badge"),
            ("error", "{}", ".card.bad"),
        ):
            tab.go(url + "/")
            tab.type(goods.pointer())
            tab.key("Tab")
            tab.type(bundle)
            tab.key("Tab")
            tab.key("Enter")
            tab.until(f"document.querySelector('{wanted}') !== null")
            look(name)
        tab.go(url + "/docs")
        tab.evaluate("document.querySelector('details').open = true")
        look("docs")
        assert tab.complaints() == []
