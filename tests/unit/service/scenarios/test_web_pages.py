"""Web pages: promises checked without a browser, and the view of a user in Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

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


def test_uploaded_files_of_form_are_verified_and_listed_in_history(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    files = {
        "model": ("m.safetensors", claim_fixtures.model_bytes),
        "bundle": ("claim.json", json.dumps(claim_fixtures.right_bundle).encode()),
    }
    assert service.client.post("/uploads", files=files).headers["location"] == "/"
    sign_in(service)
    foreign = {"Origin": "https://evil.example.org"}
    assert service.client.post("/uploads", files=files, headers=foreign).status_code == 403
    address = service.client.post("/uploads", files=files).headers["location"]
    query = parse_qs(urlsplit(address).query)
    assert query["model"] == [f"sha256:{claim_fixtures.digest}"]
    form = service.client.get(address).text
    assert query["model"][0] in form and query["bundle"][0] in form and "no request yet" in form
    assert "The files are uploaded." in form and "<button autofocus>Verify</button>" in form
    assert "The files are uploaded." not in service.client.get("/").text
    fields = {name: values[0] for name, values in query.items()}
    address, page = submit_form(service, fields)
    assert "Accepted" in page and 'class="id"' in page and "2<sup>−128.0</sup>" in page and "2^" not in page
    page = service.client.get("/").text
    assert f'href="{address}"' in page and "1 accepted" in page
    assert f'data-value="{claim_fixtures.digest}"' in page
    sign_in(service)  # another token
    assert address not in service.client.get("/").text
    for broken in ({"model": ("m", b"")}, {"other": ("m", b"x")}, {}):
        answer = service.client.post("/uploads", files=broken, headers={"Accept": "text/html"})
        assert answer.status_code in (400, 415, 422) and "card bad" in answer.text


def test_session_cookie_over_https_has_host_prefix(start_service: ServiceFactory) -> None:
    service = start_service(public_url="https://verify.example.org")
    service.client.base_url = "https://testserver"
    answer = service.client.post("/session", data={"token": service.token()})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-mtlsign_session=") and "Secure" in cookie and "Path=/;" in cookie
    assert "domain" not in cookie.lower()
    assert "Your requests" in service.client.get("/").text
    service.client.cookies.clear()
    other = {"Cookie": f"mtlsign_session={cookie.partition('=')[2].partition(';')[0]}"}
    assert "Your requests" not in service.client.get("/", headers=other).text


def test_page_names_its_script_with_its_digest(service: ServiceHarness) -> None:
    sign_in(service)
    page = service.client.get("/")
    script = service.client.get("/page.js")
    digest = base64.b64encode(hashlib.sha384(script.content).digest()).decode()
    assert f'src="/page.js" integrity="sha384-{digest}"' in page.text and page.text.count("<script") == 1
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy
    assert script.headers["content-type"].startswith("text/javascript")


@pytest.mark.skipif(
    chromium_driver.BINARY is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
@pytest.mark.parametrize("script", [True, False], ids=["with scripts", "without scripts"])
def test_pages_in_chromium_are_usable_by_keyboard(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, tmp_path: Path, script: bool
) -> None:
    from mtlsign.config.service import ServiceSettings
    from mtlsign.service.verifier.verifier import Verifier

    take_pictures = "MTLSIGN_TEST_PICTURES" in os.environ
    shots = Path(os.environ.get("MTLSIGN_TEST_PICTURES", tmp_path / "pictures"))
    scheme = "light" if script else "dark"
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    settings = ServiceSettings.of(
        {"state_dir": tmp_path / "state", "allowed_locations": [f"file://{claim_fixtures.folder}"]}
    )
    backend = BlockedBackend(Verifier(settings))
    bundle_file = tmp_path / "claim.json"
    bundle_file.write_text(json.dumps(claim_fixtures.right_bundle))
    service = start_service(backend=backend)

    def look(name: str) -> None:
        for width in (1200, 380):
            tab.send("Emulation.setEmulatedMedia", features=features)
            if script or take_pictures:
                tab.picture(shots / scheme / f"{name}-{width}.png", width)
            # No horizontal scrolling. The page may be reloading itself, hence `until`.
            tab.until("(e => e.scrollWidth <= e.clientWidth)(document.documentElement)", seconds=10)

    with serve_on_socket(service) as url, chromium_driver.Browser(tmp_path / "profile") as tab:
        tab.send("Emulation.setScriptExecutionDisabled", value=not script)
        tab.go(url + "/")
        look("fresh")
        tab.type(service.token())  # the field has the focus
        tab.key("Enter")
        tab.until_loaded("document.querySelector('#bundle') !== null")
        look("home")
        tab.type(claim_fixtures.location())
        tab.key("Tab")
        tab.type(json.dumps(claim_fixtures.right_bundle))
        tab.key("Tab")
        tab.key("Enter")
        # The form before has an element of this role as well, so the state is looked for by its class.
        tab.until_loaded("document.querySelector('.card.open[role=status]') !== null")
        look("while")
        backend.go.set()
        tab.until_loaded("document.querySelector('.good .badge') !== null")  # the page reloads itself
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
            tab.until_loaded(f"document.querySelector('{selector}') !== null")
            look(name)
        files = {"#model-file": claim_fixtures.folder / "marked.safetensors", "#bundle-file": bundle_file}
        tab.go(url + "/")
        for selector, file in files.items():
            root = tab.send("DOM.getDocument")["root"]["nodeId"]
            node = tab.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
            tab.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
        tab.evaluate("document.querySelector('form[data-progress] button').click()")
        tab.until_loaded(f"document.querySelector('#model')?.value === 'sha256:{claim_fixtures.digest}'")
        assert tab.evaluate("document.querySelectorAll('td a').length") == 3  # the history
        look("uploaded")
        tab.go(url + "/docs")
        tab.evaluate("document.querySelector('details').open = true")
        look("docs")
        assert tab.console_errors() == []
