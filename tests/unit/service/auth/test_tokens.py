"""Bearer tokens and scopes."""

from __future__ import annotations

from pathlib import Path

from mtlsign.service.auth import tokens
from tests.unit.service.fixtures import (
    ClaimFixtures,
    ServiceHarness,
    assert_problem,
    limit_memory_and_time,
    problem_type,
)

BODY = {"claims": [{}], "wait_s": 0}


def test_tokens_with_wrong_text_scope_or_state_are_refused(service: ServiceHarness) -> None:
    post, database = service.client.post, service.state.database
    assert_problem(post("/v1/verifications", json=BODY), "unauthenticated")
    for text in ("", "x", "Basic abc", "Bearer mtls_", "Bearer " + "a" * 5000):
        assert_problem(
            post("/v1/verifications", json=BODY, headers={"Authorization": text}), "unauthenticated"
        )
    good = service.token("ledger")
    nearly = good[:-1] + ("0" if good[-1] != "0" else "1")
    assert_problem(
        post("/v1/verifications", json=BODY, headers={"Authorization": f"Bearer {nearly}"}), "unauthenticated"
    )
    assert_problem(
        post("/v1/verifications", json=BODY, headers={"Authorization": f"Bearer {good}"}), "forbidden"
    )
    old = service.headers("verify")
    database.execute("UPDATE tokens SET expires=0 WHERE scopes='verify'")
    assert_problem(post("/v1/verifications", json=BODY, headers=old), "unauthenticated")
    admin = service.headers("admin")
    assert_problem(service.client.get("/v1/tokens", headers=service.headers("verify")), "forbidden")
    created = post("/v1/tokens", json={"name": "new", "scopes": ["verify"]}, headers=admin)
    assert created.status_code == 201
    new = {"Authorization": f"Bearer {created.json()['token']}"}
    assert post("/v1/verifications", json=BODY, headers=new).status_code in (200, 202)
    assert_problem(
        post("/v1/tokens", json={"name": "n", "scopes": ["root"]}, headers=admin), "malformed-request"
    )
    assert service.client.delete(f"/v1/tokens/{created.json()['id']}", headers=admin).status_code == 204
    assert_problem(post("/v1/verifications", json=BODY, headers=new), "unauthenticated")
    listed = service.client.get("/v1/tokens", headers=admin).text
    everything = b"".join(
        p.read_bytes() for p in Path(service.state.settings.state_dir).glob("service.sqlite*")
    )
    for text in (good, created.json()["token"], admin["Authorization"][7:]):
        assert text not in listed and text.encode() not in everything  # stored as hashes only


def test_token_has_exactly_its_scopes(service: ServiceHarness) -> None:
    assert tokens.SCOPES == ("verify", "ledger", "admin")
    text = service.token("verify", "ledger")
    assert tokens.check(service.state.database, text).scopes == {"verify", "ledger"}


def test_tokens_expired_or_malformed_are_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    text = service.token("ledger")
    expired = tokens.issue(service.state.database, "old", ["verify"], 1e-9)
    for header, kind in {
        "": "unauthenticated", "Bearer nonsense": "unauthenticated", f"Bearer {expired}": "unauthenticated",
        f"Bearer {text}": "forbidden", f"Token {text}": "unauthenticated",
        f"Bearer {text}, Bearer {text}": "unauthenticated",
    }.items():  # fmt: skip
        with limit_memory_and_time(seconds=5):
            answer = service.verify(claim_fixtures.claim(), headers={"Authorization": header})
        assert problem_type(answer.json()) == kind, header
    cookie = service.client.post("/session", data={"token": service.token()}).headers["set-cookie"]
    answer = service.verify(claim_fixtures.claim(), headers={"Cookie": cookie.partition(";")[0]})
    assert problem_type(answer.json()) == "unauthenticated"  # sessions are for pages only


def test_sessions_of_one_token_are_bounded_and_the_newest_stay(service: ServiceHarness) -> None:
    database, text = service.state.database, service.token()
    sessions = [tokens.open_session(database, text) for _ in range(tokens.MAX_SESSIONS + 5)]
    other = tokens.open_session(database, service.token())
    valid = [tokens.token_of_session(database, secret) is not None for secret in sessions]
    assert valid == [False] * 5 + [True] * tokens.MAX_SESSIONS
    assert tokens.token_of_session(database, other) is not None
