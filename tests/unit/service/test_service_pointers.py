"""Where a stranger's pointer may lead and where it is stopped: prefixes, links, addresses, redirects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import SettingsError
from mtlsign.service.fetch.https import Response, check_address, open_https
from mtlsign.service.fetch.locations import AllowedLocations, HttpsResource, LocalFile, S3Object, UploadedFile
from mtlsign.service.fetch.model_cache import ModelFetcher
from mtlsign.service.problems import Problem

POLICY = AllowedLocations.of(
    "file:///srv/models, s3://good/pre, https://models.example.org/a, https://cdn.example.net:8443"
)


def kind(call: Callable[[], Any]) -> str:
    with pytest.raises(Problem) as caught:
        call()
    return caught.value.kind


def test_what_is_allowed() -> None:
    assert POLICY.source("sha256:" + "ab" * 32) == UploadedFile("ab" * 32)
    assert POLICY.source("file:///srv/models/x/m.safetensors") == LocalFile(
        "/srv/models", ("x", "m.safetensors")
    )
    assert POLICY.source("s3://good/pre/models/d") == S3Object("good", "pre/models/d")
    assert POLICY.source("https://models.example.org/a/m.safetensors?v=1") == HttpsResource(
        "models.example.org", 443, "/a/m.safetensors?v=1"
    )
    assert POLICY.source("https://CDN.example.net:8443/z") == HttpsResource("cdn.example.net", 8443, "/z")


@pytest.mark.parametrize(
    "pointer",
    [
        "", "x" * 3000, "/etc/passwd", "file:///etc/passwd", "file:///srv/models/../../etc/passwd",
        "file:///srv/models/%2e%2e/x", "file:///srv/modelsX/a", "file://host/srv/models/a", "file:///srv/models\x00",
        "file:///srv/models/a\\..\\b", "s3://good/other/a", "s3://good/prefix", "s3://evil/pre/a",
        "s3://good/pre/a?endpoint_override=127.0.0.1:80&scheme=http", "s3://k:s@good/pre/a", "http://models.example.org/a/x",
        "https://models.example.org/b/x", "https://models.example.org:444/a/x", "https://user@models.example.org/a/x",
        "https://127.0.0.1/a/x", "https://[::1]/a", "https://2130706433/a", "https://0x7f.1/a", "https://localhost/a",
        "https://models.example.org.evil.com/a/x", "https://models.example.org/a/../b", "https://models.example.org/a/x#f",
        "ftp://models.example.org/a", "data:,x", "gopher://x", "sha256:" + "AB" * 32, "sha256:abc", "s3://good/pre/ü",
        "https://mödels.example.org/a", "file:///srv/models/a//b",
    ],
)  # fmt: skip
def test_what_is_refused(pointer: str) -> None:
    assert kind(lambda: POLICY.source(pointer)) == "pointer-refused"


@given(
    st.text(max_size=60)
    | st.text("/.%:@s3filehtp\\?#[]", max_size=40).map(lambda t: "file:///srv/models/" + t)
)
def test_any_text_is_refused_or_stays_below_its_prefix(text: str) -> None:
    try:
        found = POLICY.source(text)
    except Problem as problem:
        assert problem.kind == "pointer-refused" and (not text or text not in problem.detail or len(text) < 3)
        return
    if isinstance(found, LocalFile):
        assert os.path.normpath(os.path.join(found.root, *found.parts)).startswith("/srv/models")
        assert ".." not in found.parts


def test_a_prefix_that_is_none_is_refused_at_start() -> None:
    for text in ("ftp://x", "/srv", "https://127.0.0.1/", "s3://A"):
        with pytest.raises(SettingsError, match="allow"):
            AllowedLocations.of(text)


def library(tmp_path: Path, **settings: Any) -> ModelFetcher:
    return ModelFetcher(
        ServiceSettings.of({"state": tmp_path / "s", "allow": f"file://{tmp_path}/in", **settings})
    )


def test_links_pipes_and_folders_are_not_followed(tmp_path: Path) -> None:
    inside, secret = tmp_path / "in", tmp_path / "secret.safetensors"
    (inside / "sub").mkdir(parents=True)
    secret.write_bytes(b"x")
    (inside / "link.safetensors").symlink_to(secret)
    (inside / "dir").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.safetensors")
    (inside / "sub.safetensors").mkdir()
    found = library(tmp_path)
    for name in ("link.safetensors", "dir/secret.safetensors", "pipe.safetensors", "sub.safetensors"):
        assert kind(partial(found.model, f"file://{inside}/{name}")) == "pointer-refused", name
    assert kind(lambda: found.model(f"file://{inside}/none.safetensors")) == "unreachable"
    assert not [p for p in (tmp_path / "s" / "cache").iterdir()]


def test_sizes_are_known_before_reading_and_the_cache_is_bounded(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    with (inside / "big.safetensors").open("wb") as file:
        file.truncate(3 * 2**20)
    for i in range(4):
        (inside / f"{i}.safetensors").write_bytes(bytes([i]) * 2**20)
    found = library(tmp_path, max_model_mb=2, cache_mb=2)
    assert kind(lambda: found.model(f"file://{inside}/big.safetensors")) == "too-large"
    for i in range(4):
        found.model(f"file://{inside}/{i}.safetensors")
    assert sum(p.stat().st_size for p in found.cache.folder.iterdir()) <= 2 * 2**20
    before = found.downloads
    assert found.model(f"file://{inside}/3.safetensors")[2]
    assert found.downloads == before  # remembered


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "::1", "::",
        "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "ff02::1", "fd00:ec2::254", "no address",
        "192.0.0.192", "168.63.129.16", "64:ff9b:1::7f00:1", "::7f00:1",
    ],
)  # fmt: skip
def test_addresses_of_ours_are_refused(address: str) -> None:
    assert kind(lambda: check_address(address)) == "pointer-refused"


class Net:
    """A network that is not there: names, answers, and what was asked of which address."""

    def __init__(self, answers: dict[str, Response], names: dict[str, list[list[str]]] | None = None) -> None:
        self.answers, self.names, self.asked = answers, names or {}, []  # type: ignore[var-annotated]

    def resolve(self, host: str, port: int) -> list[str]:
        queue = self.names.get(host, [["93.184.216.34"]])
        return queue.pop(0) if len(queue) > 1 else queue[0]

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:
        self.asked.append((address, host, path))
        return self.answers[path]


def said(body: bytes = b"x" * 10, status: int = 200, **headers: str) -> Response:
    whole = {"content-length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    return Response(status, whole, iter([body]))


def fetch(net: Net, path: str = "/a/m", limit: int = 100, seconds: float = 10, clock: Any = None) -> bytes:
    more = {"clock": clock} if clock else {}
    source = HttpsResource("models.example.org", 443, path)
    with open_https(source, POLICY, limit, seconds, resolver=net.resolve, transport=net, **more) as (
        size,
        pieces,
    ):
        data = b"".join(pieces)
        assert len(data) == size
        return data


def test_the_checked_address_is_the_one_used_whatever_dns_says_next() -> None:
    net = Net({"/a/m": said()}, {"models.example.org": [["93.184.216.34"], ["127.0.0.1"]]})
    assert fetch(net) == b"x" * 10 and net.asked == [("93.184.216.34", "models.example.org", "/a/m")]
    assert kind(lambda: fetch(net)) == "pointer-refused" and len(net.asked) == 1  # rebound: never connected
    mixed = Net({}, {"models.example.org": [["93.184.216.34", "10.0.0.1"]]})
    assert kind(lambda: fetch(mixed)) == "pointer-refused" and not mixed.asked


def test_redirects_stay_inside_and_end() -> None:
    inside = Net({"/a/m": said(b"", 302, location="/a/n"), "/a/n": said(b"yes")})
    assert fetch(inside) == b"yes" and len(inside.asked) == 2
    for out in (
        "https://evil.example.com/",
        "http://models.example.org/a/n",
        "/b",
        "https://169.254.169.254/latest",
    ):
        assert kind(partial(fetch, Net({"/a/m": said(b"", 302, location=out)}))) == "pointer-refused"
    assert kind(lambda: fetch(Net({"/a/m": said(b"", 301, location="/a/m")}))) == "pointer-refused"
    rebound = Net(
        {"/a/m": said(b"", 302, location="/a/n")}, {"models.example.org": [["93.184.216.34"], ["127.0.0.1"]]}
    )
    assert kind(lambda: fetch(rebound)) == "pointer-refused" and len(rebound.asked) == 1


def test_bodies_that_lie_end_or_never_begin() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    assert kind(lambda: fetch(Net({"/a/m": Response(200, {}, endless())}))) == "unreachable"
    assert (
        kind(lambda: fetch(Net({"/a/m": Response(200, {"content-length": "50"}, endless())})))
        == "unreachable"
    )
    assert kind(lambda: fetch(Net({"/a/m": said(content_length="101")}))) == "too-large"
    assert kind(lambda: fetch(Net({"/a/m": said(content_length="-1")}))) == "unreachable"
    assert kind(lambda: fetch(Net({"/a/m": said(content_encoding="gzip")}))) == "unreachable"
    assert kind(lambda: fetch(Net({"/a/m": said(status=404)}))) == "unreachable"


def test_a_drip_ends_in_time() -> None:
    now = [0.0]

    def drip() -> Iterator[bytes]:
        while True:
            now[0] += 1
            yield b"x"

    net = Net({"/a/m": Response(200, {"content-length": "100"}, drip())})
    assert kind(lambda: fetch(net, seconds=60, clock=lambda: now[0])) == "too-long" and now[0] < 15
