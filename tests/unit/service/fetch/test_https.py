"""Fetching over https: addresses, redirects, sizes, rates and proxies."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from mtlsign.service.fetch.https import Response, check_address, open_https
from mtlsign.service.fetch.locations import HttpsResource
from tests.unit.service.fakes import FakeNetwork, fake_response
from tests.unit.service.fixtures import ALLOWED, problem_kind


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
def test_check_address_private_or_reserved_is_refused(address: str) -> None:
    assert problem_kind(lambda: check_address(address)) == "pointer-refused"


def fetch(responses: dict[str, Response], limit: int = 100, seconds: float = 10, clock: Any = None) -> bytes:
    """Fetch /a/m from a network with these responses."""
    return fetch_from(FakeNetwork(responses), limit, seconds, clock)


def fetch_from(network: FakeNetwork, limit: int = 100, seconds: float = 10, clock: Any = None) -> bytes:
    """Fetch /a/m and check the announced size."""
    options = {"resolver": network.resolve, "transport": network} | ({"clock": clock} if clock else {})
    resource = HttpsResource("models.example.org", 443, "/a/m")
    with open_https(resource, ALLOWED, limit, seconds, **options) as (size, pieces):
        data = b"".join(pieces)
        assert len(data) == size
        return data


CHANGED_DNS = {"models.example.org": [["93.184.216.34"], ["127.0.0.1"]]}


def test_open_https_connects_to_checked_address_after_dns_change() -> None:
    network = FakeNetwork({"/a/m": fake_response()}, copy.deepcopy(CHANGED_DNS))
    assert fetch_from(network) == b"x" * 10
    assert network.requests == [("93.184.216.34", "models.example.org", "/a/m")]
    assert problem_kind(lambda: fetch_from(network)) == "pointer-refused"
    assert len(network.requests) == 1  # the changed address is never connected to
    mixed = FakeNetwork({}, {"models.example.org": [["93.184.216.34", "10.0.0.1"]]})
    assert problem_kind(lambda: fetch_from(mixed)) == "pointer-refused" and not mixed.requests


def test_open_https_redirects_are_checked_and_bounded() -> None:
    inside = FakeNetwork({"/a/m": fake_response(b"", 302, location="/a/n"), "/a/n": fake_response(b"yes")})
    assert fetch_from(inside) == b"yes" and len(inside.requests) == 2
    for target in (
        "https://evil.example.com/",
        "http://models.example.org/a/n",
        "/b",
        "https://169.254.169.254/latest",
    ):
        responses = {"/a/m": fake_response(b"", 302, location=target)}
        assert problem_kind(partial(fetch, responses)) == "pointer-refused"
    loop = {"/a/m": fake_response(b"", 301, location="/a/m")}
    assert problem_kind(lambda: fetch(loop)) == "pointer-refused"
    redirect = {"/a/m": fake_response(b"", 302, location="/a/n")}
    changed = FakeNetwork(redirect, copy.deepcopy(CHANGED_DNS))
    assert problem_kind(lambda: fetch_from(changed)) == "pointer-refused" and len(changed.requests) == 1


def test_open_https_with_wrong_length_or_encoding_is_refused() -> None:
    def endless_body() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    for response, kind in (
        (Response(200, {}, endless_body()), "unreachable"),
        (Response(200, {"content-length": "50"}, endless_body()), "unreachable"),
        (fake_response(content_length="101"), "too-large"),
        (fake_response(content_length="-1"), "unreachable"),
        (fake_response(content_encoding="gzip"), "unreachable"),
        (fake_response(status=404), "unreachable"),
    ):
        assert problem_kind(partial(fetch, {"/a/m": response})) == kind


def test_open_https_with_slow_body_ends_in_time() -> None:
    now = [0.0]

    def slow_body() -> Iterator[bytes]:
        while True:
            now[0] += 1
            yield b"x"

    responses = {"/a/m": Response(200, {"content-length": "100"}, slow_body())}
    assert problem_kind(lambda: fetch(responses, seconds=60, clock=lambda: now[0])) == "too-long"
    assert now[0] < 15


def test_urllib_transport_ignores_proxies_of_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlsign.service.fetch.https import UrllibTransport

    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap.getsockname()[1]}")
        with pytest.raises(OSError):
            UrllibTransport().get("127.0.0.1", "models.example.org", 1, "/", 1.0)  # port 1 is closed
        with pytest.raises(TimeoutError):
            trap.accept()
    assert os.environ["HTTPS_PROXY"]
