"""Fetching over https from hosts named by clients, protected against server-side request forgery.

Each host name is resolved once for each hop, and all its addresses must be public. The connection goes to
the checked address under the certificate of the name. A name that resolves differently later has no effect.
Proxies in the environment are ignored.
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
MAX_REDIRECTS = 3
#: Lowest average rate in bytes per second after the grace period.
MIN_RATE = 16 * 1024
GRACE_S = 10.0

Resolver = Callable[[str, int], list[str]]
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
#: Global according to `ipaddress`, but used inside clouds (metadata services) or by relays.
_INTERNAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))


@dataclass
class Response:
    """Response of a transport: status, headers in lower case, and the body in pieces."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]
    close: Callable[[], None] = lambda: None


class Transport(Protocol):
    """Sender of one GET request to one address."""

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:
        """Send `GET path` for `host` to `address` without following redirects. Raises OSError."""


def system_resolver(host: str, port: int) -> list[str]:
    """Return the addresses of a name from the system's resolver. Raises OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class UrllibTransport:
    """Transport by urllib3: TLS to a given address with the certificate and SNI of the name.

    Args:
        context: TLS context with the trusted authorities; default: those of the system.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.context = context or ssl.create_default_context()

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:  # noqa: D102
        connection = HTTPSConnection(
            address, port, timeout=min(10.0, timeout), ssl_context=self.context, server_hostname=host,
            assert_hostname=host,
        )  # fmt: skip
        # The socket's timeout applies to each read; this timer also ends headers or bodies sent byte by byte.
        timer = threading.Timer(timeout, _shutdown_socket, [connection])
        timer.daemon = True
        timer.start()

        def close() -> None:
            timer.cancel()
            connection.close()

        try:
            connection.request(
                "GET", path, preload_content=False, decode_content=False,
                headers={"Host": host if port == 443 else f"{host}:{port}", "Accept-Encoding": "identity"},
            )  # fmt: skip
            answer = connection.getresponse()
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


def _shutdown_socket(connection: HTTPSConnection) -> None:
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def check_address(address: str) -> str:
    """Return `address` if it is public. Raises Problem `pointer-refused`."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        raise location_refused("The host has no usable address. Name another host.") from None
    for candidate in filter(None, (ip, getattr(ip, "sixtofour", None))):
        if (
            not candidate.is_global
            or candidate.is_multicast
            or candidate.is_reserved
            or any(candidate in net for net in _INTERNAL if net.version == candidate.version)
            or (candidate.version == 6 and candidate not in _GLOBAL_V6)  # includes mapped addresses
        ):
            raise location_refused("The host has a private or reserved address. Name a public host.")
    return str(ip)


@contextmanager
def open_https(
    resource: HttpsResource, allowed: AllowedLocations, limit: int, seconds: float, *,
    resolver: Resolver = system_resolver, transport: Transport | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, Iterator[bytes]]]:  # fmt: skip
    """Yield the size of a resource, checked before its body is read, and its bytes in pieces.

    Args:
        resource: the resource.
        allowed: prefixes, which also apply to the targets of redirects.
        limit: largest size in bytes.
        seconds: time limit of the whole transfer.
        resolver: resolver of host names.
        transport: sender of requests; None: urllib3.
        clock: monotonic clock in seconds.

    Raises:
        Problem: pointer-refused (address or redirect), too-large, unreachable, too-long.
    """
    start, transport = clock(), transport or UrllibTransport()
    for _ in range(MAX_REDIRECTS + 1):
        address = _resolve(resource, resolver)
        remaining = _remaining(start, seconds, clock)
        try:
            answer = transport.get(address, resource.host, resource.port, resource.path, remaining)
        except OSError as error:
            raise Problem("unreachable", f"The host does not answer ({error}). Try again.") from None
        if answer.status in (301, 302, 303, 307, 308):
            target = urljoin(_url(resource), answer.headers.get("location", ""))
            answer.close()
            location = allowed.resolve(target)
            if not isinstance(location, HttpsResource):
                raise location_refused("The host redirects to another scheme. Use a final https address.")
            resource = location
            continue
        try:
            yield _size(answer, limit), _rate_checked(answer, limit, start, seconds, clock)
        finally:
            answer.close()
        return
    raise location_refused(f"The host redirects more than {MAX_REDIRECTS} times. Use the final address.")


def _resolve(resource: HttpsResource, resolver: Resolver) -> str:
    """Return the first address of the host after checking all of them."""
    try:
        addresses = resolver(resource.host, resource.port)
    except OSError:
        addresses = []
    if not addresses:
        raise Problem("unreachable", "The host of the location has no address. Correct the location.")
    checked = [check_address(address) for address in addresses]
    return checked[0]


def _url(resource: HttpsResource) -> str:
    return f"https://{resource.host}:{resource.port}{resource.path}"


def _size(answer: Response, limit: int) -> int:
    """Return the announced size of a response after checking it."""
    if answer.status != 200:
        raise Problem("unreachable", f"The host answers with status {answer.status}. Correct the location.")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unreachable", "The host compresses the file. Serve it without content encoding.")
    text = answer.headers.get("content-length", "")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Problem("unreachable", "The host does not announce the file's size. Send Content-Length.")
    if int(text) > limit:
        detail = f"The file has {int(text)} bytes; {limit} are allowed. Use a smaller file."
        raise Problem("too-large", detail)
    return int(text)


def _remaining(start: float, seconds: float, clock: Callable[[], float]) -> float:
    remaining = start + seconds - clock()
    if remaining <= 0:
        raise Problem("too-long", f"The host needs more than {seconds:g} seconds. Use a faster host.")
    return remaining


def _rate_checked(
    answer: Response, limit: int, start: float, seconds: float, clock: Callable[[], float]
) -> Iterator[bytes]:
    """Yield the pieces of a body while it keeps its size, the time limit and the lowest rate."""
    size = _size(answer, limit)
    received, began = 0, clock()
    try:
        for piece in answer.chunks:
            received += len(piece)
            if received > size:
                detail = "The host sends more bytes than announced. Serve a plain file."
                raise Problem("unreachable", detail)
            _remaining(start, seconds, clock)
            elapsed = clock() - began
            if elapsed > GRACE_S and received < MIN_RATE * elapsed:
                raise Problem("too-long", "The host sends too slowly. Use a faster host.")
            yield piece
    except OSError as error:
        raise Problem("unreachable", f"The host closed the connection ({error}). Try again.") from None
