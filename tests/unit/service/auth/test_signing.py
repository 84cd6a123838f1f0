"""Signed verdicts and rotation of the service's keys."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import pytest

from mtlsign.errors import ClaimError
from mtlsign.service.auth.signing import read_verdict
from tests.unit.service.fakes import SlowBackend
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, ServiceHarness, statuses


def test_signed_verdict_contains_result_and_detects_changes(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    headers = service.headers()
    result = service.verify(claim_fixtures.claim(), headers=headers).json()["results"][0]
    answer = service.client.get(f"/v1/verdicts/{result['id']}", headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(
        "application/vnd.in-toto+json"
    )
    key = service.client.get("/v1/keys").json()["keys"][0]["public_key"]
    verdict = read_verdict(answer.content, trusted=[key])
    assert (
        verdict["suspect"] == claim_fixtures.digest
        and verdict["status"] == "accepted"
        and verdict["key"] == result["key"]
    )
    assert verdict["matches"] == result["verdict"]["matches"] and verdict["millibits"] > 120_000
    with pytest.raises(ClaimError):
        read_verdict(answer.content, trusted=["00" * 32])
    envelope = json.loads(answer.content)
    payload = base64.b64decode(envelope["payload"]).replace(b'"accepted"', b'"rejected"')
    envelope["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(ClaimError):
        read_verdict(json.dumps(envelope, separators=(",", ":")).encode())


def test_key_rotation_keeps_old_verdicts_and_encrypted_requests_readable(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, tmp_path: Path
) -> None:
    from mtlsign.watermark.keys.identity import Identity

    old = start_service(backend=SlowBackend())
    headers = old.headers()
    address = old.verify(claim_fixtures.claim(), headers=headers, wait_s=0).headers["location"]
    old.client.__exit__(None, None, None)
    old.state.database.execute("UPDATE jobs SET lease=0")
    Identity.generate().save(tmp_path / "new.json", None)
    new = start_service(
        identity=tmp_path / "new.json", previous_identities=[str(tmp_path / "state" / "identity.json")]
    )
    end = time.monotonic() + 20
    while (answered := new.client.get(address, headers=headers)).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert statuses(answered) == ["accepted"]
    listed = new.client.get("/v1/keys").json()["keys"]
    assert [key["current"] for key in listed] == [True, False]
    envelope = new.client.get(f"/v1/verdicts/{answered.json()['results'][0]['id']}", headers=headers).content
    assert read_verdict(envelope)["signer"] == listed[0]["public_key"]
    old.client.__enter__()
