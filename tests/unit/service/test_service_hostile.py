"""The hostile set, one by one through the interface: the right problem, in time, and without growth.

Names are resolved and https is spoken by objects of this file: no test sends traffic off the machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_service_page import served  # type: ignore[import-not-found]
from test_service_pointers import Net, said  # type: ignore[import-not-found]
from test_service_suspects import LIES  # type: ignore[import-not-found]

from mtlsign.service.auth import tokens
from mtlsign.service.fetch.https import Response
from mtlsign.service.json_input import _unquoted
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.claim_bundle import read_bundle, to_json
from mtlsign.storage.manifest import manifest_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from tests.unit.service.fixtures import Goods, Service, Start, bounded

HOST = "https://models.example.org/a"


def type_of(result: Any) -> str:
    found = result.get("problem", result)
    return str(found["type"]).rpartition(":")[2]


@pytest.mark.parametrize("name", LIES)
def test_files_that_are_no_models(service: Service, goods: Goods, name: str) -> None:
    pointer = goods.put(f"hostile/{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors", LIES[name])
    with bounded(seconds=10):
        bad, good = service.ask(goods.claim(pointer), goods.claim()).json()["results"]
    assert type_of(bad) == "not-a-model" and good["verdict"]["status"] == "accepted"


def endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 65_536


def drip() -> Iterator[bytes]:
    while True:
        time.sleep(0.05)
        yield b"x"


NETS = {
    "loopback": (Net({}, {"models.example.org": [["127.0.0.1"]]}), "pointer-refused"),
    "metadata": (Net({}, {"models.example.org": [["169.254.169.254"]]}), "pointer-refused"),
    "one address of two is ours": (
        Net({}, {"models.example.org": [["93.184.216.34", "::ffff:10.0.0.1"]]}), "pointer-refused",
    ),
    "redirect to metadata": (
        Net({"/a/m.safetensors": said(b"", 302, location="https://169.254.169.254/x")}), "pointer-refused",
    ),
    "redirect chain": (
        Net({"/a/m.safetensors": said(b"", 302, location="/a/m.safetensors")}), "pointer-refused",
    ),
    "DNS changes between hops": (
        Net(
            {"/a/m.safetensors": said(b"", 302, location="/a/n.safetensors"), "/a/n.safetensors": said(b"x")},
            {"models.example.org": [["93.184.216.34"], ["127.0.0.1"]]},
        ),
        "pointer-refused",
    ),
    "endless": (Net({"/a/m.safetensors": Response(200, {"content-length": "9"}, endless())}), "unreachable"),
    "no length": (Net({"/a/m.safetensors": Response(200, {}, endless())}), "unreachable"),
    "too long": (Net({"/a/m.safetensors": said(content_length=str(2**40))}), "too-large"),
    "slow drip": (Net({"/a/m.safetensors": Response(200, {"content-length": "999"}, drip())}), "too-long"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_hosts_that_lie(start: Start, goods: Goods, name: str) -> None:
    net, kind = NETS[name]
    service = start(resolver=net.resolve, transport=net, allow=HOST, fetch_s=1.0)
    with bounded(seconds=5):
        (result,) = service.ask(goods.claim(f"{HOST}/m.safetensors")).json()["results"]
    assert type_of(result) == kind
    assert all(address == "93.184.216.34" for address, _, _ in net.asked)


def test_a_bundle_that_drips_delays_nobody_else(start: Start, goods: Goods) -> None:
    net = Net({path: Response(200, {"content-length": "999"}, drip()) for path in ("/b", "/c")})
    service = start(
        resolver=net.resolve, transport=net, allow=f"https://models.example.org,file://{goods.folder}",
        fetch_s=4.0, claim_s=2.0,
    )  # fmt: skip
    slow = service.ask(goods.claim(bundle="https://models.example.org/b"), wait_s=0)
    begin = time.monotonic()
    (result,) = service.ask(goods.claim()).json()["results"]
    assert result["verdict"]["status"] == "accepted" and time.monotonic() - begin < 3
    (result,) = service.ask(goods.claim(bundle="https://models.example.org/c")).json()["results"]
    assert slow.status_code == 202 and type_of(result) == "too-long"


def test_pointers_through_links_and_upwards(service: Service, goods: Goods) -> None:
    link = goods.folder / "link.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to("/etc/passwd")
    bad = [goods.pointer("link.safetensors"), goods.pointer("../x"), "file:///etc/passwd", "s3://b/x"]
    with bounded(seconds=10):
        results = service.ask(*[goods.claim(p) for p in bad], goods.claim()).json()["results"]
    assert [type_of(r) for r in results[:-1]] == ["pointer-refused"] * len(bad)
    assert results[-1]["verdict"]["status"] == "accepted"


BODIES = {
    "deep": b'{"claims": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "invalid UTF-8": b'{"claims": ["\xff\xfe"]}',
    "ten million lists": b'{"claims": [' + b"[]," * (10 * 2**20) + b"[]]}",
    "ten million fields": b'{"claims": [{' + b'"":0,' * (6 * 2**20) + b'"a":1}]}',
    "a number of a million digits": b'{"claims": [' + b"9" * 1_000_000 + b"]}",
}


@pytest.mark.parametrize("name", BODIES)
def test_json_that_costs_more_than_it_weighs(service: Service, name: str) -> None:
    headers = service.headers(**{"Content-Type": "application/json"})
    with bounded():
        answer = service.client.post("/v1/verifications", content=BODIES[name], headers=headers)
    assert answer.status_code == 400 and type_of(answer.json()) == "malformed-request"


def test_the_largest_body_that_is_read(service: Service, goods: Goods) -> None:
    heavy = {**goods.right, "reference": base64.b64encode(bytes(23 * 2**20)).decode()}
    body = json.dumps({"claims": [goods.claim(bundle=heavy)], "wait_s": 30}).encode()
    headers = service.headers(**{"Content-Type": "application/json"})
    with bounded(400):  # its text, the parsed text, the sealed text: some ten times as much as was sent
        answer = service.client.post("/v1/verifications", content=body, headers=headers)
    assert type_of(answer.json()["results"][0]) == "bad-bundle"


def test_a_gigabyte_and_a_drip_over_a_real_socket(start: Start) -> None:
    service = start(body_s=1.5)
    bearer = service.headers()["Authorization"]

    def send(head: str, pieces: Iterator[bytes]) -> bytes:
        with socket.create_connection((host, int(port)), timeout=20) as link:
            link.sendall(f"POST /v1/verifications HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
            try:
                for piece in pieces:
                    link.sendall(piece)
                    link.setblocking(False)
                    try:
                        if link.recv(1, socket.MSG_PEEK) != b"":
                            break  # it answers before all is there
                    except BlockingIOError:
                        pass
                    finally:
                        link.settimeout(20)
            except OSError:
                pass
            answer = b""
            try:
                while more := link.recv(65_536):
                    answer += more
            except OSError:
                pass
            return answer

    always = f"Authorization: {bearer}\r\nContent-Type: application/json\r\n"
    with served(service) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with bounded():
            said = send(always + f"Content-Length: {2**30}\r\n", iter([b"{"]))
            assert b" 413 " in said.split(b"\r\n")[0] and b"problem:too-large" in said
            chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
            said = send(always + "Transfer-Encoding: chunked\r\n", (chunk for _ in range(1024)))
            assert b" 413 " in said.split(b"\r\n")[0] or said == b""  # reset while we were sending
            begin = time.monotonic()
            said = send(always + "Content-Length: 1000\r\n", (drop for drop in drip()))
            assert b" 408 " in said.split(b"\r\n")[0] and time.monotonic() - begin < 5


def test_tokens_that_open_nothing(service: Service, goods: Goods) -> None:
    text = service.token("ledger")
    expired = tokens.issue(service.office.store, "old", ["verify"], 1e-9)
    for header, kind in {
        "": "unauthenticated", "Bearer nonsense": "unauthenticated", f"Bearer {expired}": "unauthenticated",
        f"Bearer {text}": "forbidden", f"Token {text}": "unauthenticated",
        f"Bearer {text}, Bearer {text}": "unauthenticated",
    }.items():  # fmt: skip
        with bounded(seconds=5):
            answer = service.ask(goods.claim(), headers={"Authorization": header})
        assert type_of(answer.json()) == kind, header
    cookie = service.client.post("/session", data={"token": service.token()}).headers["set-cookie"]
    answer = service.ask(goods.claim(), headers={"Cookie": cookie.partition(";")[0]})
    assert type_of(answer.json()) == "unauthenticated"  # a session is the page's, never the interface's


def test_a_kit_that_names_a_factory(service: Service, goods: Goods, owner: Identity) -> None:
    fields = json.loads(KeyOpening.from_json(json.dumps(goods.right["opening"])).spec)
    fields["graph"] = {"arch": "own/os:system", "command": "x"}
    spec = sign_spec(owner, make_spec(**fields))
    bundle = to_json(spec, base64.b64decode(goods.right["reference"]))
    with bounded(seconds=10):
        results = service.ask(goods.claim(bundle=bundle), goods.claim(bundle={**bundle, "kit": "x"})).json()
    assert [type_of(r) for r in results["results"]] == ["architecture-refused", "kit-refused"]


def directory(entries: int) -> bytes:
    """A ZIP that is nothing but a table of contents."""
    one = (
        struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
        + b"a"
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(one) * entries, 4, 0)
    return b"PK\3\4" + one * entries + end


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle.json", bytes(2**26))
    return out.getvalue()


BOMBS = {"directory": directory(10**6), "bomb": bomb(), "lists": b"{" + b'"a":[],' * 10**6 + b"}"}


@pytest.mark.parametrize("name", BOMBS)
def test_claim_files_that_unpack_to_more(service: Service, goods: Goods, name: str) -> None:
    with bounded(), pytest.raises(Problem) as caught:
        read_bundle(BOMBS[name])
    assert caught.value.kind == "bad-bundle"
    place = goods.put(f"hostile/{name}.zip", BOMBS[name])
    with bounded(seconds=10):
        bad, good = service.ask(goods.claim(bundle=place), goods.claim()).json()["results"]
    assert type_of(bad) == "bad-bundle" and good["verdict"]["status"] == "accepted"


def test_a_folder_that_names_somebody_else_s_model(start: Start, goods: Goods) -> None:
    """A manifest with the digest of a model that another one had fetched is no way to that model."""
    service = start()
    service.ask(goods.claim())
    goods.put("thief/manifest.json", manifest_bytes({"model.safetensors": goods.marked}))
    (result,) = service.ask(goods.claim(goods.pointer("thief"))).json()["results"]
    assert type_of(result) == "unreachable"


def test_an_upload_that_is_only_announced_opens_nothing(service: Service, goods: Goods) -> None:
    mine, theirs = service.headers(), service.headers()
    assert service.client.put(f"/v1/models/{goods.digest}", content=goods.marked, headers=mine).is_success
    store = service.office.store
    token = theirs["Authorization"].split("_")[1]
    ticket = store.reserve(token, len(goods.marked), 60, 2**30)  # an upload under way, its bytes not sent yet
    answer = service.ask(goods.claim(f"sha256:{goods.digest}"), headers=theirs)
    assert type_of(answer.json()["results"][0]) == "not-found"
    with pytest.raises(Problem) as caught:
        store.reserve(token, 2**30, 60, 2**30)  # and it counts
    assert caught.value.kind == "quota"
    store.release(ticket)


@pytest.mark.parametrize(
    "text", ["{{7*7}}", "${7*7}", "<script>alert(1)</script>", "'\"><img src=x onerror=1>"]
)
def test_templates_repeat_what_they_are_given_as_text(service: Service, text: str) -> None:
    made = service.client.post("/session", data={"token": service.token(name=text[:64])})
    assert made.status_code == 303
    page = (
        service.client.get("/").text
        + service.client.post("/checks", data={"model": text, "bundle": "{"}).text
    )
    assert "49" not in page and "<script" not in page and "<img" not in page


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlsign.service.fetch.https import UrllibTransport

    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap.getsockname()[1]}")
        with pytest.raises(OSError):
            UrllibTransport().get("127.0.0.1", "models.example.org", 1, "/", 1.0)  # nobody listens on port 1
        with pytest.raises(TimeoutError):
            trap.accept()
    assert os.environ["HTTPS_PROXY"]


def test_what_nobody_thought_of_is_that_claim_s_problem_alone(start: Start, goods: Goods) -> None:
    class Broken:
        def get(self, *_: Any) -> Response:
            raise ValueError("a defect in a library")

    service = start(
        resolver=lambda *_: ["93.184.216.34"], transport=Broken(), allow=f"{HOST},file://{goods.folder}"
    )
    asked = [goods.claim(f"{HOST}/m.safetensors"), goods.claim(bundle=f"{HOST}/b"), goods.claim()]
    results = service.ask(*asked).json()["results"]
    assert [type_of(r) for r in results[:2]] == ["internal"] * 2
    assert results[2]["verdict"]["status"] == "accepted"


def test_forms_that_cost_more_than_they_weigh(service: Service) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    escapes = b"%41" * (4 * 2**20 // 3)
    for path in ("/session", "/leave", "/v1/tokens", "/nothing"):
        with bounded(60, seconds=5):
            answer = service.client.post(path, content=b"token=" + escapes, headers=headers)
        assert type_of(answer.json()) == "too-large", path
    service.client.post("/session", data={"token": service.token()})
    with bounded(60, seconds=10):
        answer = service.client.post("/checks", content=b"model=x&bundle=%7B" + escapes, headers=headers)
    assert answer.status_code == 422 and len(answer.content) < 2**16


@given(
    st.lists(st.sampled_from([b"%", b"4", b"1", b"%41", b"+", b"%c3%a9", b"x"])).map(b"".join),
    st.integers(3, 9),
)
def test_forms_are_read_as_the_library_reads_them(value: bytes, piece: int) -> None:
    try:
        wanted = unquote_to_bytes(value.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            _unquoted(value, piece)
    else:
        assert _unquoted(value, piece) == wanted
