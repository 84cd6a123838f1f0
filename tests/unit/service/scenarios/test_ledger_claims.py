"""Claims with a ledger: claim files of the owner, and commitment and votes on the page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtlsign.claims import owner as owners
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.judge import Finding
from mtlsign.service.auth.signing import read_verdict
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import ClaimScenario
from tests.unit.service.fixtures import ClaimFixtures, ServiceFactory, sign_in, submit_form


class AcceptingJudge:
    """Judge that accepts every claim."""

    def judge(self, *_: Any) -> Finding:
        return Finding("accepted", 128, 128, 128.0)


@pytest.fixture(scope="module")
def registered_claim(
    marked_model: Any,
    owner: Identity,
    claim_fixtures: ClaimFixtures,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Return (ledger, id, claim file) of a claim that was published, cosigned and voted on."""
    folder = tmp_path_factory.mktemp("ledger")
    scenario, kit = ClaimScenario(folder), marked_model[1].kit
    scenario.archive.put(kit.reference)
    owners.publish(scenario.owner(owner), [kit])
    scenario.cosign_all()
    entry, _ = owners.claim(
        scenario.owner(owner),
        [kit],
        scenario.archive,
        claim_fixtures.model_bytes,
        own_model=claim_fixtures.model_bytes,
    )
    view = scenario.run_council(AcceptingJudge())
    name = entry.leaf.hex()
    claim_entry, _ = find_claim(view, name)
    write_bundle(folder / "claim.zip", scenario.ledger, view, claim_entry, scenario.archive)
    return f"sqlite:///{folder}/ledger.db", name, (folder / "claim.zip").read_bytes()


def test_claim_file_is_verified_and_bound_to_its_claim(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, registered_claim: Any
) -> None:
    uri, name, file = registered_claim
    service = start_service(ledger=uri)
    headers = service.headers()
    results = service.verify(
        claim_fixtures.claim(bundle=claim_fixtures.write("claim.zip", file)), headers=headers
    ).json()["results"]
    assert results[0]["verdict"]["status"] == "accepted"
    envelope = service.client.get(f"/v1/verdicts/{results[0]['id']}", headers=headers).content
    assert read_verdict(envelope)["claim"] == name
    unbound = service.verify(
        claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "claim": name}), headers=headers
    ).json()["results"]
    envelope = service.client.get(f"/v1/verdicts/{unbound[0]['id']}", headers=headers).content
    assert read_verdict(envelope)["claim"] is None  # the client only named the claim, so it is not signed
    damaged = file.replace(b'"claim":', b'"c1aim":')
    bad = service.verify(claim_fixtures.claim(bundle=claim_fixtures.write("damaged.zip", damaged))).json()[
        "results"
    ]
    assert bad[0]["problem"]["type"].endswith("bad-bundle")


def test_verification_page_shows_commitment_votes_and_lineage(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, registered_claim: Any
) -> None:
    uri, name, file = registered_claim
    service = start_service(ledger=uri)
    sign_in(service)
    fields = {"model": claim_fixtures.location(), "bundle": claim_fixtures.write("claim.zip", file)}
    _, page = submit_form(service, fields)
    for text in ("Accepted", "Key committed", "Claimed", "5 accepted", "3 of 5 votes decide", "Lineage"):
        assert text in page, text
    assert "no other claim on this model" in page
    assert "Against the claim" not in page
    ledger = service.client.get("/ledger").text
    assert "membership" in ledger and "vote" in ledger and "Co-signed" in ledger
    for bundle in (
        {**claim_fixtures.right_bundle, "claim": "ab" * 32},
        {**claim_fixtures.wrong_bundle, "claim": name},
    ):
        fields["bundle"] = json.dumps(bundle)  # no claim of the ledger, and one of another key
        _, page = submit_form(service, fields)
        assert "This service knows of none" in page and "5 accepted" not in page


def test_verification_page_counts_rival_claims(
    start_service: ServiceFactory,
    claim_fixtures: ClaimFixtures,
    registered_claim: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, _, file = registered_claim
    service = start_service(ledger=uri)
    sign_in(service)
    monkeypatch.setattr(service.state.ledger, "_rivals", lambda *_: {"rivals": [8, 9], "earlier_rivals": 1})
    fields = {"model": claim_fixtures.location(), "bundle": claim_fixtures.write("claim.zip", file)}
    _, page = submit_form(service, fields)
    assert "2 other claims on this model" in page and "cannot judge which model descends" in page
    command = page.split("mtlsign dispute ")[1].split("</code>")[0]
    assert command.startswith("--ledger LEDGER --archive ARCHIVE --claims ")
    assert command.endswith(" --claims 8 --claims 9")
    assert "1 of the other keys was committed before this one" in page
