"""Web pages: promises checked without a browser, and the view of a user in Chromium."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers import chromium_driver
from tests.unit.service.fakes import BlockedBackend
from tests.unit.service.fixtures import (
    ClaimFixtures,
    ServiceFactory,
    ServiceHarness,
    serve_on_socket,
    sign_in,
    submit_form,
)


def test_pages_without_session_show_sign_in_only(service: ServiceHarness) -> None:
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


def test_forms_of_other_sites_are_refused(service: ServiceHarness) -> None:
    sign_in(service)
    for headers in (
        {"Origin": "https://evil.example.org"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
    ):
        answer = service.client.post("/checks", data={"model": "x", "bundle": "y"}, headers=headers)
        assert answer.status_code == 403
    secure = service.client.post("/session", content=b"token=x", headers={"Content-Type": "text/plain"})
    assert secure.status_code == 415


def test_claim_form_leads_to_signed_verdict(service: ServiceHarness, claim_fixtures: ClaimFixtures) -> None:
    sign_in(service)
    fields = {"model": claim_fixtures.location(), "bundle": json.dumps(claim_fixtures.right_bundle)}
    address, page = submit_form(service, fields)
    assert "Accepted" in page and "<svg" in page and "evidence" in page.lower()
    link = page.split('href="/verdicts/')[1].split('"')[0]
    envelope = service.client.get(f"/verdicts/{link}")
    assert envelope.headers["content-disposition"].startswith("attachment") and envelope.json()["signatures"]
    bad = service.client.post("/checks", data={"model": "<b>x", "bundle": "{nope"})
    assert bad.status_code == 422 and "<b>x" not in bad.text and "&lt;b&gt;x" in bad.text
    service.client.post("/leave", data={"": ""})
    assert service.client.get(address).headers["location"] == "/"


@pytest.mark.skipif(
    chromium_driver.BINARY is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
@pytest.mark.parametrize("script", [True, False], ids=["with scripts", "without scripts"])
def test_pages_in_chromium_are_usable_by_keyboard(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, tmp_path: Path, script: bool
) -> None:
    from mtlsign.config.service import ServiceSettings
    from mtlsign.service.verifier.verifier import Verifier

    shots = Path(os.environ.get("MTLSIGN_TEST_PICTURES", tmp_path / "pictures"))
    settings = ServiceSettings.of(
        {"state_dir": tmp_path / "state", "allowed_locations": [f"file://{claim_fixtures.folder}"]}
    )
    backend = BlockedBackend(Verifier(settings))
    service = start_service(backend=backend)

    def look(name: str) -> None:
        for width in (1200, 380):
            if script:
                tab.picture(shots / f"{name}-{width}.png", width)
            wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, (name, width)  # no horizontal scrolling

    with serve_on_socket(service) as url, chromium_driver.Browser(tmp_path / "profile") as tab:
        tab.send("Emulation.setScriptExecutionDisabled", value=not script)
        tab.go(url + "/")
        look("fresh")
        tab.type(service.token())  # the field has the focus
        tab.key("Enter")
        tab.until("document.querySelector('#bundle') !== null")
        tab.settle()
        look("home")
        tab.type(claim_fixtures.location())
        tab.key("Tab")
        tab.type(json.dumps(claim_fixtures.right_bundle))
        tab.key("Tab")
        tab.key("Enter")
        tab.until("document.querySelector('[role=status]') !== null")
        look("while")
        backend.go.set()
        tab.until("document.querySelector('.good .badge') !== null")  # the page reloads itself
        assert tab.evaluate("document.querySelector('svg.null').getBoundingClientRect().width") > 200
        look("accepted")
        for name, bundle, selector in (
            ("rejected", json.dumps(claim_fixtures.wrong_bundle), ".bad .badge"),
            ("error", "{}", ".card.bad"),
        ):
            tab.go(url + "/")
            tab.type(claim_fixtures.location())
            tab.key("Tab")
            tab.type(bundle)
            tab.key("Tab")
            tab.key("Enter")
            tab.until(f"document.querySelector('{selector}') !== null")
            look(name)
        tab.go(url + "/docs")
        tab.evaluate("document.querySelector('details').open = true")
        look("docs")
        assert tab.console_errors() == []
