"""HTTP interface: bodies, uploads, ledger, log and OpenAPI."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from mtlsign.claims.ledger.open import open_ledger
from mtlsign.claims.merkle import verify_inclusion
from mtlsign.claims.owner import Owner, create_ledger
from mtlsign.watermark.keys.identity import Identity
from tests.unit.service.fixtures import (
    ClaimFixtures,
    ServiceFactory,
    ServiceHarness,
    assert_problem,
    statuses,
)


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
def test_malformed_bodies_are_refused(start_service: ServiceFactory, body: bytes, kind: str) -> None:
    service = start_service(max_body_mb=1)
    headers = service.headers(**{"Content-Type": "application/json"})
    assert_problem(service.client.post("/v1/verifications", content=body, headers=headers), kind)


def test_body_with_wrong_length_or_type_is_refused_before_reading(service: ServiceHarness) -> None:
    headers = service.headers(**{"Content-Type": "application/json", "Content-Length": str(10**9)})
    assert_problem(service.client.post("/v1/verifications", content=b"{}", headers=headers), "too-large")
    headers = service.headers(**{"Content-Type": "application/xml"})
    assert_problem(
        service.client.post("/v1/verifications", content=b"<x/>", headers=headers), "wrong-media-type"
    )
    headers = service.headers(**{"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert_problem(
        service.client.post("/v1/verifications", content=b"x", headers=headers), "wrong-media-type"
    )
    assert_problem(service.client.get("/v1/nothing"), "not-found")
    assert_problem(service.client.patch("/v1/verifications"), "wrong-method")
    assert_problem(service.client.get("/v1/verifications/../../x", headers=service.headers()), "not-found")


def test_docs_page_describes_interface_without_scripts(service: ServiceHarness) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200 and "POST /v1/verifications" in page.text and "kit-refused" in page.text
    assert "<script" not in page.text and "://" not in page.text.replace("s3://BUCKET", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_uploads_are_checked_owned_and_expire(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    service = start_service(max_model_mb=1, upload_quota_mb=1)
    mine, theirs = service.headers(), service.headers()
    put = service.client.put
    path = f"/v1/models/{claim_fixtures.digest}"
    assert_problem(put(path, content=claim_fixtures.model_bytes[:-1], headers=mine), "wrong-digest")
    assert_problem(put("/v1/models/..%2f..%2fx", content=b"x", headers=mine), "not-found")
    assert_problem(put("/v1/models/" + "AB" * 32, content=b"x", headers=mine), "malformed-request")
    assert_problem(put(path, content=b"x" * (2**20 + 1), headers=mine), "too-large")
    claim = claim_fixtures.claim(f"sha256:{claim_fixtures.digest}")
    assert statuses(service.verify(claim, headers=mine)) == ["not-found"]
    created = put(path, content=claim_fixtures.model_bytes, headers=mine)
    assert created.status_code == 201 and created.json()["model"] == claim["model"]
    assert service.client.get(path, headers=mine).status_code == 200
    assert_problem(service.client.get(path, headers=theirs), "not-found")
    # A client that sends other bytes under the digest gains no access to the file.
    assert_problem(put(path, content=b"wrong bytes", headers=theirs), "wrong-digest")
    assert statuses(service.verify(claim, headers=theirs)) == ["not-found"]
    assert statuses(service.verify(claim, headers=mine)) == ["accepted"]
    other = b"y" * (2**20 - 10)
    assert_problem(
        put(f"/v1/models/{hashlib.sha256(other).hexdigest()}", content=other, headers=mine), "quota"
    )
    service.state.database.execute("UPDATE uploads SET expires=1")
    assert_problem(service.client.get(path, headers=mine), "not-found")
    assert service.state.database.delete_expired(1e9, 10**9) == set()
    os.utime(service.state.uploads.path(claim_fixtures.digest), (0, 0))
    service.state.uploads.delete_unreferenced(set())
    assert not service.state.uploads.has(claim_fixtures.digest)
    assert not [p for p in service.state.uploads.folder.iterdir() if p.name.startswith(".part")]


def test_ledger_endpoints_return_entries_proofs_and_signing_key(
    start_service: ServiceFactory, tmp_path: Path, owner: Identity
) -> None:
    uri = f"sqlite:///{tmp_path}/ledger.db"
    with open_ledger(uri, create=True) as ledger:
        create_ledger(Owner(owner, ledger, tmp_path / "memory.json"), [owner.public_key])
    service = start_service(ledger=uri, publish_signing_key=True)
    headers = service.headers("ledger")
    get = service.client.get
    key = get("/v1/keys").json()["keys"][0]
    assert key["entry"] == 1 and key["public_key"] == service.state.keys.current.public_key.hex()
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
        assert_problem(get(f"/v1/ledger/{bad}", headers=headers), "not-found")
    assert_problem(get("/v1/ledger/head", headers=service.headers("verify")), "forbidden")
    assert_problem(get("/v1/ledger/head"), "unauthenticated")


def test_ledger_endpoint_without_ledger_is_not_found(service: ServiceHarness) -> None:
    assert_problem(service.client.get("/v1/ledger/head", headers=service.headers("ledger")), "not-found")


def test_log_contains_events_and_no_secret(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers = service.headers("verify")
    service.verify(
        claim_fixtures.claim(), claim_fixtures.claim("https://secret.example.org/x"), headers=headers
    )
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "mtlsign.service"]
    accepted = next(line for line in lines if line["event"] == "job_accepted")
    assert accepted["token"] == headers["Authorization"].split("_")[1] and accepted["claims"] == 2
    assert {
        "event": "request",
        "method": "POST",
        "route": "/v1/verifications",
        "status": 200,
    }.items() <= next(line for line in lines if line["event"] == "request").items()
    log = "\n".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records)
    secrets = [
        headers["Authorization"][7:],
        claim_fixtures.right_bundle["opening"]["signature"],
        "secret.example.org",
    ]
    assert not [s for s in secrets if s in log]
    sums = service.state.metrics.sums  # type: ignore[attr-defined]
    assert sums["mtlsign_answers", "accepted"] == 1 and sums["mtlsign_refusals", "pointer-refused"] == 1


def test_openapi_describes_every_route(service: ServiceHarness) -> None:
    document = service.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if path.startswith("/v1/") and path != "/v1/keys":
                assert "401" in operation["responses"] and operation["security"], (path, method)
    assert "/v1/verifications" in document["paths"] and "/" not in document["paths"]
