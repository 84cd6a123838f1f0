"""With a ledger: a claim file as the owner writes it, and what the page says of commitment and votes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_service_page import enter  # type: ignore[import-not-found]

from mtlsign.claims import owner as owners
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.judge import Finding
from mtlsign.service.auth.signing import read_verdict
from mtlsign.watermark.keys.identity import Identity
from tests.unit.claims.scenario import Town
from tests.unit.service.fixtures import Goods, Start


class Convinced:
    """A council that accepts."""

    def judge(self, *_: Any) -> Finding:
        return Finding("accepted", 128, 128, 128.0)


@pytest.fixture(scope="module")
def claimed(marked: Any, owner: Identity, goods: Goods, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ledger, claim's id, claim file): published, attested, claimed, voted on."""
    folder = tmp_path_factory.mktemp("town")
    town, kit = Town(folder), marked[1].kit
    town.archive.put(kit.reference)
    owners.publish(town.owner(owner), [kit])
    town.attest()
    entry, _ = owners.claim(town.owner(owner), [kit], town.archive, goods.marked, marked=goods.marked)
    view = town.vote(Convinced())
    name = entry.leaf.hex()
    found, _ = find_claim(view, name)
    write_bundle(folder / "claim.zip", town.ledger, view, found, town.archive)
    return f"sqlite:///{folder}/ledger.db", name, (folder / "claim.zip").read_bytes()


def test_a_claim_file_is_an_opened_claim(start: Start, goods: Goods, claimed: Any) -> None:
    uri, name, file = claimed
    service = start(ledger=uri)
    headers = service.headers()
    results = service.ask(goods.claim(bundle=goods.put("claim.zip", file)), headers=headers).json()["results"]
    assert results[0]["verdict"]["status"] == "accepted"
    envelope = service.client.get(f"/v1/verdicts/{results[0]['id']}", headers=headers).content
    assert read_verdict(envelope)["claim"] == name
    named = service.ask(goods.claim(bundle={**goods.right, "claim": name}), headers=headers).json()["results"]
    envelope = service.client.get(f"/v1/verdicts/{named[0]['id']}", headers=headers).content
    assert read_verdict(envelope)["claim"] is None  # named beside the opening: nothing to sign
    damaged = file.replace(b'"claim":', b'"c1aim":')
    bad = service.ask(goods.claim(bundle=goods.put("damaged.zip", damaged))).json()["results"]
    assert bad[0]["problem"]["type"].endswith("bad-bundle")


def test_the_page_tells_of_commitment_votes_and_the_ledger(start: Start, goods: Goods, claimed: Any) -> None:
    uri, name, file = claimed
    service = start(ledger=uri)
    enter(service)
    fields = {"model": goods.pointer(), "bundle": goods.put("claim.zip", file)}
    page = service.client.get(service.client.post("/checks", data=fields).headers["location"]).text
    for said in ("Accepted", "Key committed", "Claimed", "5 accepted", "3 of 5 decide", "Lineage"):
        assert said in page, said
    assert "no other claim on this model" in page
    assert "Against the claim" not in page
    ledger = service.client.get("/ledger").text
    assert "membership" in ledger and "vote" in ledger and "Co-signed" in ledger
    for bundle in ({**goods.right, "claim": "ab" * 32}, {**goods.wrong, "claim": name}):
        fields["bundle"] = json.dumps(bundle)  # no claim of the ledger, and one of another key
        page = service.client.get(service.client.post("/checks", data=fields).headers["location"]).text
        assert "this service knows of none" in page and "5 accepted" not in page


def test_the_page_counts_rivals_and_names_who_judges_them(
    start: Start, goods: Goods, claimed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _, file = claimed
    service = start(ledger=uri)
    enter(service)
    monkeypatch.setattr(service.office.ledger, "_rivals", lambda *_: 2)
    fields = {"model": goods.pointer(), "bundle": goods.put("claim.zip", file)}
    page = service.client.get(service.client.post("/checks", data=fields).headers["location"]).text
    assert "2 other claims on this model" in page and "jobs/dispute.py" in page
