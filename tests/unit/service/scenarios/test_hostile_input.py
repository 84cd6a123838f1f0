"""Hostile input through the HTTP interface: the right problem, in time, within the memory limit.

Host names and https are simulated; no test sends traffic to another machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest

from mtlsign.service.fetch.https import Response
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.claim_bundle import read_bundle, to_json
from mtlsign.storage.manifest import manifest_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from tests.unit.service.fakes import FakeNetwork, fake_response
from tests.unit.service.fixtures import (
    ClaimFixtures,
    ServiceFactory,
    ServiceHarness,
    limit_memory_and_time,
    problem_type,
    serve_on_socket,
)
from tests.unit.service.invalid_models import INVALID_FILES

HOST = "https://models.example.org/a"


@pytest.mark.parametrize("name", INVALID_FILES)
def test_invalid_model_files_are_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, name: str
) -> None:
    location = claim_fixtures.write(
        f"hostile/{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors", INVALID_FILES[name]
    )
    with limit_memory_and_time(seconds=10):
        bad, good = service.verify(claim_fixtures.claim(location), claim_fixtures.claim()).json()["results"]
    assert problem_type(bad) == "not-a-model" and good["verdict"]["status"] == "accepted"


def endless_body() -> Iterator[bytes]:
    while True:
        yield b"x" * 65_536


def slow_body() -> Iterator[bytes]:
    while True:
        time.sleep(0.05)
        yield b"x"


NETWORKS = {
    "loopback": (FakeNetwork({}, {"models.example.org": [["127.0.0.1"]]}), "pointer-refused"),
    "metadata": (FakeNetwork({}, {"models.example.org": [["169.254.169.254"]]}), "pointer-refused"),
    "one of two addresses is private": (
        FakeNetwork({}, {"models.example.org": [["93.184.216.34", "::ffff:10.0.0.1"]]}),
        "pointer-refused",
    ),
    "redirect to metadata": (
        FakeNetwork({"/a/m.safetensors": fake_response(b"", 302, location="https://169.254.169.254/x")}),
        "pointer-refused",
    ),
    "redirect chain": (
        FakeNetwork({"/a/m.safetensors": fake_response(b"", 302, location="/a/m.safetensors")}),
        "pointer-refused",
    ),
    "DNS changes between hops": (
        FakeNetwork(
            {
                "/a/m.safetensors": fake_response(b"", 302, location="/a/n.safetensors"),
                "/a/n.safetensors": fake_response(b"x"),
            },
            {"models.example.org": [["93.184.216.34"], ["127.0.0.1"]]},
        ),
        "pointer-refused",
    ),
    "endless": (
        FakeNetwork({"/a/m.safetensors": Response(200, {"content-length": "9"}, endless_body())}),
        "unreachable",
    ),
    "no length": (FakeNetwork({"/a/m.safetensors": Response(200, {}, endless_body())}), "unreachable"),
    "too long": (FakeNetwork({"/a/m.safetensors": fake_response(content_length=str(2**40))}), "too-large"),
    "slow body": (
        FakeNetwork({"/a/m.safetensors": Response(200, {"content-length": "999"}, slow_body())}),
        "too-long",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hostile_hosts_are_refused(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures, name: str
) -> None:
    network, kind = NETWORKS[name]
    service = start_service(
        resolver=network.resolve, transport=network, allowed_locations=[HOST], fetch_timeout_s=1.0
    )
    with limit_memory_and_time(seconds=5):
        (result,) = service.verify(claim_fixtures.claim(f"{HOST}/m.safetensors")).json()["results"]
    assert problem_type(result) == kind
    assert all(address == "93.184.216.34" for address, _, _ in network.requests)


def test_slow_bundle_does_not_delay_other_claims(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    network = FakeNetwork(
        {path: Response(200, {"content-length": "999"}, slow_body()) for path in ("/b", "/c")}
    )
    service = start_service(
        resolver=network.resolve,
        transport=network,
        allowed_locations=["https://models.example.org", f"file://{claim_fixtures.folder}"],
        fetch_timeout_s=4.0,
        claim_timeout_s=2.0,
    )
    slow = service.verify(claim_fixtures.claim(bundle="https://models.example.org/b"), wait_s=0)
    begin = time.monotonic()
    (result,) = service.verify(claim_fixtures.claim()).json()["results"]
    assert result["verdict"]["status"] == "accepted" and time.monotonic() - begin < 3
    (result,) = service.verify(claim_fixtures.claim(bundle="https://models.example.org/c")).json()["results"]
    assert slow.status_code == 202 and problem_type(result) == "too-long"


def test_locations_through_links_or_upwards_are_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    link = claim_fixtures.folder / "link.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to("/etc/passwd")
    bad = [
        claim_fixtures.location("link.safetensors"),
        claim_fixtures.location("../x"),
        "file:///etc/passwd",
        "s3://b/x",
    ]
    with limit_memory_and_time(seconds=10):
        results = service.verify(*[claim_fixtures.claim(p) for p in bad], claim_fixtures.claim()).json()[
            "results"
        ]
    assert [problem_type(r) for r in results[:-1]] == ["pointer-refused"] * len(bad)
    assert results[-1]["verdict"]["status"] == "accepted"


BODIES = {
    "deep": b'{"claims": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "invalid UTF-8": b'{"claims": ["\xff\xfe"]}',
    "ten million lists": b'{"claims": [' + b"[]," * (10 * 2**20) + b"[]]}",
    "ten million fields": b'{"claims": [{' + b'"":0,' * (6 * 2**20) + b'"a":1}]}',
    "a number of a million digits": b'{"claims": [' + b"9" * 1_000_000 + b"]}",
}


@pytest.mark.parametrize("name", BODIES)
def test_json_with_disproportionate_cost_is_refused(service: ServiceHarness, name: str) -> None:
    headers = service.headers(**{"Content-Type": "application/json"})
    with limit_memory_and_time():
        answer = service.client.post("/v1/verifications", content=BODIES[name], headers=headers)
    assert answer.status_code == 400 and problem_type(answer.json()) == "malformed-request"


def test_largest_allowed_body_stays_within_memory_limit(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    bundle = {**claim_fixtures.right_bundle, "reference": base64.b64encode(bytes(23 * 2**20)).decode()}
    body = json.dumps({"claims": [claim_fixtures.claim(bundle=bundle)], "wait_s": 30}).encode()
    headers = service.headers(**{"Content-Type": "application/json"})
    # The body, the parsed text and the encrypted text take about ten times the size of the body.
    with limit_memory_and_time(400):
        answer = service.client.post("/v1/verifications", content=body, headers=headers)
    assert problem_type(answer.json()["results"][0]) == "bad-bundle"


def test_gigabyte_and_slow_bodies_on_socket_are_refused(start_service: ServiceFactory) -> None:
    service = start_service(body_timeout_s=1.5)
    bearer = service.headers()["Authorization"]

    def send(head: str, pieces: Iterator[bytes]) -> bytes:
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(f"POST /v1/verifications HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    connection.setblocking(False)
                    try:
                        if connection.recv(1, socket.MSG_PEEK) != b"":
                            break  # the server answers before the body is complete
                    except BlockingIOError:
                        pass
                    finally:
                        connection.settimeout(20)
            except OSError:
                pass
            answer = b""
            try:
                while more := connection.recv(65_536):
                    answer += more
            except OSError:
                pass
            return answer

    common = f"Authorization: {bearer}\r\nContent-Type: application/json\r\n"
    with serve_on_socket(service) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with limit_memory_and_time():
            answer = send(common + f"Content-Length: {2**30}\r\n", iter([b"{"]))
            assert b" 413 " in answer.split(b"\r\n")[0] and b"problem:too-large" in answer
            chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
            answer = send(common + "Transfer-Encoding: chunked\r\n", (chunk for _ in range(1024)))
            assert b" 413 " in answer.split(b"\r\n")[0] or answer == b""  # reset while sending
            begin = time.monotonic()
            answer = send(common + "Content-Length: 1000\r\n", slow_body())
            assert b" 408 " in answer.split(b"\r\n")[0] and time.monotonic() - begin < 5


def test_bundle_with_factory_or_kit_is_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, owner: Identity
) -> None:
    fields = json.loads(KeyOpening.from_json(json.dumps(claim_fixtures.right_bundle["opening"])).spec)
    fields["architecture"] = {"arch": "custom/os:system", "command": "x"}
    spec = sign_spec(owner, make_spec(**fields))
    bundle = to_json(spec, base64.b64decode(claim_fixtures.right_bundle["reference"]))
    with limit_memory_and_time(seconds=10):
        results = service.verify(
            claim_fixtures.claim(bundle=bundle), claim_fixtures.claim(bundle={**bundle, "kit": "x"})
        ).json()
    assert [problem_type(r) for r in results["results"]] == ["architecture-refused", "kit-refused"]


def zip_directory(entries: int) -> bytes:
    """Return a ZIP file that consists of a central directory only."""
    entry = (
        struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
        + b"a"
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry) * entries, 4, 0)
    return b"PK\3\4" + entry * entries + end


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle.json", bytes(2**26))
    return out.getvalue()


BOMBS = {"directory": zip_directory(10**6), "bomb": zip_bomb(), "lists": b"{" + b'"a":[],' * 10**6 + b"}"}


@pytest.mark.parametrize("name", BOMBS)
def test_claim_file_bombs_are_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, name: str
) -> None:
    with limit_memory_and_time(), pytest.raises(Problem) as caught:
        read_bundle(BOMBS[name])
    assert caught.value.kind == "bad-bundle"
    location = claim_fixtures.write(f"hostile/{name}.zip", BOMBS[name])
    with limit_memory_and_time(seconds=10):
        bad, good = service.verify(claim_fixtures.claim(bundle=location), claim_fixtures.claim()).json()[
            "results"
        ]
    assert problem_type(bad) == "bad-bundle" and good["verdict"]["status"] == "accepted"


def test_manifest_with_digest_of_other_model_is_not_trusted(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    """A manifest that names the digest of a cached model of another client gives no access to it."""
    service = start_service()
    service.verify(claim_fixtures.claim())
    claim_fixtures.write(
        "attacker/manifest.json", manifest_bytes({"model.safetensors": claim_fixtures.model_bytes})
    )
    (result,) = service.verify(claim_fixtures.claim(claim_fixtures.location("attacker"))).json()["results"]
    assert problem_type(result) == "unreachable"


def test_announced_upload_grants_no_access(service: ServiceHarness, claim_fixtures: ClaimFixtures) -> None:
    mine, theirs = service.headers(), service.headers()
    assert service.client.put(
        f"/v1/models/{claim_fixtures.digest}", content=claim_fixtures.model_bytes, headers=mine
    ).is_success
    database = service.state.database
    token = theirs["Authorization"].split("_")[1]
    # The upload has started; no byte was sent yet.
    ticket = database.reserve_upload(token, len(claim_fixtures.model_bytes), 60, 2**30)
    answer = service.verify(claim_fixtures.claim(f"sha256:{claim_fixtures.digest}"), headers=theirs)
    assert problem_type(answer.json()["results"][0]) == "not-found"
    with pytest.raises(Problem) as caught:
        database.reserve_upload(token, 2**30, 60, 2**30)  # the reservation counts
    assert caught.value.kind == "quota"
    database.cancel_upload(ticket)


@pytest.mark.parametrize(
    "text", ["{{7*7}}", "${7*7}", "<script>alert(1)</script>", "'\"><img src=x onerror=1>"]
)
def test_templates_escape_input(service: ServiceHarness, text: str) -> None:
    answer = service.client.post("/session", data={"token": service.token(name=text[:64])})
    assert answer.status_code == 303
    page = (
        service.client.get("/").text
        + service.client.post("/checks", data={"model": text, "bundle": "{"}).text
    )
    page, scripts = re.subn(r'<script src="/page.js" integrity="sha384-[^"<>]{64}" defer></script>', "", page)
    assert scripts <= 2, "one for each page"
    assert "49" not in page and "<script" not in page and "<img" not in page


def test_unexpected_exception_while_fetching_affects_only_its_claim(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    class FaultyTransport:
        def get(self, *_: Any) -> Response:
            raise ValueError("an unexpected exception")

    service = start_service(
        resolver=lambda *_: ["93.184.216.34"],
        transport=FaultyTransport(),
        allowed_locations=[HOST, f"file://{claim_fixtures.folder}"],
    )
    claims = [
        claim_fixtures.claim(f"{HOST}/m.safetensors"),
        claim_fixtures.claim(bundle=f"{HOST}/b"),
        claim_fixtures.claim(),
    ]
    results = service.verify(*claims).json()["results"]
    assert [problem_type(r) for r in results[:2]] == ["internal"] * 2
    assert results[2]["verdict"]["status"] == "accepted"


def test_forms_with_disproportionate_cost_are_refused(service: ServiceHarness) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    escapes = b"%41" * (4 * 2**20 // 3)
    for path in ("/session", "/leave", "/v1/tokens", "/nothing"):
        with limit_memory_and_time(60, seconds=5):
            answer = service.client.post(path, content=b"token=" + escapes, headers=headers)
        assert problem_type(answer.json()) == "too-large", path
    service.client.post("/session", data={"token": service.token()})
    with limit_memory_and_time(60, seconds=10):
        answer = service.client.post("/checks", content=b"model=x&bundle=%7B" + escapes, headers=headers)
    assert answer.status_code == 422 and len(answer.content) < 2**16
