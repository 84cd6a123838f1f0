"""Fetching over https from hosts that strangers name: the address that was checked is the one that is used.

A name is resolved once for each hop, every address it has must be public, and the connection goes to the
first of them under the name's certificate. Nothing is taken from the environment (no proxies).
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urljoin

import urllib3
from urllib3.connection import HTTPSConnection

from mtlsign.service.fetch.locations import AllowedLocations, HttpsResource, location_refused
from mtlsign.service.problems import Problem

CHUNK = 2**16
REDIRECTS = 3
#: The least that a server must send, bytes a second after the first ten seconds.
SLOWEST = 16 * 1024

Resolver = Callable[[str, int], list[str]]
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
#: Called global by `ipaddress`, but answered inside clouds (metadata, wire server) or by relays.
_OURS = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))


@dataclass
class Response:
    """What a transport gives: status, headers in lower case, the body in pieces."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]
    close: Callable[[], None] = lambda: None


class Transport(Protocol):
    """How one GET is sent to one address."""

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:
        """Send `GET path` for `host` to `address`; follow nothing. Raises OSError when that fails."""


def system_resolver(host: str, port: int) -> list[str]:
    """The addresses of a name, from the system. Raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class UrllibTransport:
    """Transport by urllib3: TLS to the given address, certificate and SNI of the name.

    Args:
        context: authorities to trust; default: the system's.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.context = context or ssl.create_default_context()

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:  # noqa: D102
        link = HTTPSConnection(
            address, port, timeout=min(10.0, timeout), ssl_context=self.context, server_hostname=host,
            assert_hostname=host,
        )  # fmt: skip
        # The socket's timeout is for each read; a drip of headers or body ends with this one.
        watch = threading.Timer(timeout, _shutdown_socket, [link])
        watch.daemon = True
        watch.start()

        def close() -> None:
            watch.cancel()
            link.close()

        try:
            link.request(
                "GET", path, preload_content=False, decode_content=False,
                headers={"Host": host if port == 443 else f"{host}:{port}", "Accept-Encoding": "identity"},
            )  # fmt: skip
            answer = link.getresponse()
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            close()
            raise OSError(type(error).__name__) from None

        def pieces() -> Iterator[bytes]:
            try:
                while piece := answer.read1(CHUNK, decode_content=False):
                    yield piece
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
                raise OSError(type(error).__name__) from None

        return Response(answer.status, {k.lower(): v for k, v in answer.headers.items()}, pieces(), close)


def _shutdown_socket(link: HTTPSConnection) -> None:
    with suppress(OSError, AttributeError):
        link.sock.shutdown(socket.SHUT_RDWR)


def check_address(address: str) -> str:
    """`address` itself if anybody on the Internet may have it. Raises Problem `pointer-refused`."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        raise location_refused("names a host without a usable address") from None
    for one in filter(None, (ip, getattr(ip, "sixtofour", None))):
        if (
            not one.is_global
            or one.is_multicast
            or one.is_reserved
            or any(one in net for net in _OURS if net.version == one.version)
            or (one.version == 6 and one not in _GLOBAL_V6)  # mapped and translated addresses among them
        ):
            raise location_refused("names a host whose address is private, reserved or this machine's own")
    return str(ip)


@contextmanager
def open_https(
    source: HttpsResource, policy: AllowedLocations, limit: int, seconds: float, *,
    resolver: Resolver = system_resolver, transport: Transport | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, Iterator[bytes]]]:  # fmt: skip
    """The resource's size, known and checked before its body is read, and its bytes in pieces.

    Raises:
        Problem: pointer-refused (address, redirect out), too-large, unreachable, too-long.
    """
    start, transport = clock(), transport or UrllibTransport()
    for _ in range(REDIRECTS + 1):
        try:
            addresses = resolver(source.host, source.port)
        except OSError:
            raise Problem("unreachable", "the pointer's host has no address; correct it") from None
        if not addresses:
            raise Problem("unreachable", "the pointer's host has no address; correct it")
        checked = [check_address(address) for address in addresses]
        left = _remaining(start, seconds, clock)
        try:
            answer = transport.get(checked[0], source.host, source.port, source.path, left)
        except OSError as error:
            raise Problem("unreachable", f"the pointer's host does not answer ({error}); try again") from None
        if answer.status in (301, 302, 303, 307, 308):
            target = urljoin(_url(source), answer.headers.get("location", ""))
            answer.close()
            following = policy.source(target)
            if not isinstance(following, HttpsResource):
                raise location_refused("is redirected to something that is not https")
            source = following
            continue
        try:
            yield _size(answer, limit), _rate_checked(answer, limit, start, seconds, clock)
        finally:
            answer.close()
        return
    raise location_refused(f"is redirected more than {REDIRECTS} times")


def _url(source: HttpsResource) -> str:
    return f"https://{source.host}:{source.port}{source.path}"


def _size(answer: Response, limit: int) -> int:
    if answer.status != 200:
        raise Problem("unreachable", f"the pointer's host answers {answer.status}; correct the pointer")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unreachable", "the pointer's host compresses what it sends; serve the plain file")
    text = answer.headers.get("content-length", "")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Problem("unreachable", "the pointer's host does not say how much it sends; serve a plain file")
    if int(text) > limit:
        raise Problem("too-large", f"{int(text)} bytes lie behind the pointer, {limit} are allowed")
    return int(text)


def _remaining(start: float, seconds: float, clock: Callable[[], float]) -> float:
    left = start + seconds - clock()
    if left <= 0:
        raise Problem("too-long", f"the pointer's host needs over {seconds:g} seconds; serve it faster")
    return left


def _rate_checked(
    answer: Response, limit: int, start: float, seconds: float, clock: Callable[[], float]
) -> Iterator[bytes]:
    size = _size(answer, limit)
    seen, began = 0, clock()
    try:
        for piece in answer.chunks:
            seen += len(piece)
            if seen > size:
                raise Problem("unreachable", "the pointer's host sends more than it said; serve a plain file")
            _remaining(start, seconds, clock)
            if clock() - began > 10 and seen < SLOWEST * (clock() - began):
                raise Problem("too-long", "the pointer's host drips; serve it faster")
            yield piece
    except OSError as error:
        raise Problem("unreachable", f"the pointer's host broke off ({error}); try again") from None
