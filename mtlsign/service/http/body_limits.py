"""Limits on request bodies as ASGI middleware: bytes, seconds, rate, and memory of all bodies together.

The middleware wraps the application. It also runs inside Ray's HTTP proxy (`proxy_middlewares`), because
that proxy otherwise reads a body of any size into memory before the application sees it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from starlette.middleware import Middleware

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.service import metrics
from mtlsign.service.auth.request_tokens import TokenReader, token_id_of_request
from mtlsign.service.database import FILE_NAME
from mtlsign.service.problems import MEDIA, Problem

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
#: Returns the id of the valid token behind the headers of a request, or None. Raises sqlite3.Error.
Identify = Callable[[Mapping[bytes, bytes]], str | None]

#: Paths whose body may have `max_body_mb`; bodies of other paths are small.
_LARGE = ("/v1/verifications", "/checks")
SMALL_BODY_BYTES = 16 * 1024
_UPLOAD = re.compile(r"/v1/models/[^/]+")
#: Form of the pages that sends files.
_UPLOAD_FORM = "/uploads"
#: Header of a refusal by the middleware inside Ray's proxy.
PROXY_HEADER = "x-mtlsign-bounded"
RELEASE = "mtlsign.release"
#: Number of bodies of the largest size that fit into memory at once; one token may use half of that.
MAX_LARGE_BODIES = 4
GRACE_S = 5.0
MIN_RATE = 1024
"""Lowest average rate of a body in bytes per second after the grace period."""


class BodyLimitMiddleware:
    """ASGI middleware that limits request bodies.

    Args:
        app: the wrapped application.
        settings: the limits.
        proxy: run inside Ray's proxy. Uploads are then slowed down to `upload_rate_mb_s`, which bounds the
            memory of the proxy. A missing or crashed ingress is answered with 503 and Retry-After instead
            of Ray's 500.
        count: called with the kind of each refusal.
        identify: lookup of tokens. A body beyond the size of a small one needs a valid token, and counts
            against the share of that token. Without a lookup, or if it fails, the address has the share.
    """

    def __init__(
        self,
        app: App,
        settings: ServiceSettings,
        proxy: bool = False,
        count: Callable[[str], None] = lambda _: None,
        identify: Identify | None = None,
    ) -> None:
        self.identify = identify
        self.app, self.settings, self.proxy, self.count, self.held = app, settings, proxy, count, 0
        self.shares: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _LimitedBody(self, scope, receive)
        exchange = _Exchange(self, body, send)
        if not self.proxy:  # Ray's proxy pickles the scope, which must not contain a method
            scope[RELEASE] = body.release
        try:
            await body.check_headers()
            receive_body = exchange.receive_in_proxy if self.proxy else body.receive
            await self.app(scope, receive_body, exchange.send)
            if self.proxy and not exchange.started and not exchange.refused:
                detail = "The ingress restarted during this request. Send it again."
                raise Problem("not-ready", detail, retry_after=2)
        except Problem as problem:
            await exchange.refuse(problem)
        finally:
            body.release()


class _Exchange:
    """Response side of one request: response headers, and refusals in place of the application's response."""

    def __init__(self, limits: BodyLimitMiddleware, body: _LimitedBody, send: Send) -> None:
        self._limits, self._body, self._send = limits, body, send
        self.started = self.refused = False

    async def send(self, message: Message) -> None:
        """Forward a message of the application unless the request was refused."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            self._body.release()
            headers = [*message["headers"]]
            names = {name.lower() for name, _ in headers}
            if self._limits.proxy and message["status"] == 503 and b"retry-after" not in names:
                headers.append((b"retry-after", b"2"))  # Ray's own response without an ingress
            if self._body.unread and b"connection" not in names:
                headers.append((b"connection", b"close"))  # the client could send the rest slowly for ever
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem if no response has started."""
        self._limits.count(problem.kind)
        if self.started:
            return
        if problem.kind == "unauthenticated" and self._body.is_form:  # the session has ended: sign in again
            await _send_redirect(self._send)
        else:
            await send_problem(problem, self._send, proxy=self._limits.proxy)

    async def receive_in_proxy(self) -> Message:
        """Receive part of the body. Ray's proxy answers 500 to an exception, so a refusal is sent here."""
        try:
            return await self._body.receive()
        except Problem as problem:
            await self.refuse(problem)
            self.refused = True
            return {"type": "http.disconnect"}


def release_body(scope: Scope) -> None:
    """Stop counting the body of a request against the memory limit, because it has been parsed."""
    scope.get(RELEASE, lambda: None)()


class _LimitedBody:
    """One request body."""

    def __init__(self, limits: BodyLimitMiddleware, scope: Scope, receive: Receive) -> None:
        settings = limits.settings
        self._limits, self._receive = limits, receive
        self._headers = {k.lower(): v for k, v in scope.get("headers", ())}
        put, post = scope["method"] == "PUT", scope["method"] == "POST"
        self._upload = (put and bool(_UPLOAD.fullmatch(scope["path"]))) or (
            post and scope["path"] == _UPLOAD_FORM
        )
        self.is_form = post and not scope["path"].startswith("/v1/")
        large = post and scope["path"] in _LARGE
        body_limit = settings.body_limit if large else SMALL_BODY_BYTES
        self._limit = settings.model_limit if self._upload else body_limit
        self._seconds = settings.upload_timeout_s if self._upload else settings.body_timeout_s
        self._rate = settings.upload_rate_mb_s * MIB if self._upload and limits.proxy else 0.0
        self._start, self._received, self._complete, self.held = time.monotonic(), 0, False, 0
        self._client: str | None = None
        self._address = str((scope.get("client") or ("",))[0])

    @property
    def unread(self) -> bool:
        """True while a part of the body has not been received."""
        announced = self._headers.get(b"content-length", b"0") != b"0"
        return not self._complete and (announced or b"transfer-encoding" in self._headers)

    async def check_headers(self) -> None:
        """Check the announced length, its encoding, and the token of a large body. Raises Problem."""
        text = self._headers.get(b"content-length", b"0")
        if not text.isdigit() or len(text) > 15:
            raise Problem("malformed-request", "Content-Length is not a number. Send the length in bytes.")
        if int(text) > self._limit:
            raise Problem("too-large", f"The body has {int(text)} bytes; {self._limit} are allowed.")
        if self._headers.get(b"content-encoding", b"identity") != b"identity":
            raise Problem("wrong-media-type", "Compressed bodies are not supported. Send plain bytes.")
        if int(text) > SMALL_BODY_BYTES:
            await self._require_token()

    async def _require_token(self) -> None:
        """Look up the token of a body that is not small. Raises Problem `unauthenticated`."""
        if self._client is not None:
            return
        if self._limits.identify is None:
            self._client = self._address
            return
        try:
            token = await asyncio.to_thread(self._limits.identify, self._headers)
        except sqlite3.Error:  # a proxy on another node than the database, or a full disk
            self._client = self._address
            return
        if token is None:
            detail = "A body of this size needs a valid token. Ask the operator for a token."
            raise Problem("unauthenticated", detail)
        self._client = token

    async def receive(self) -> Message:
        """Receive one part of the body. Raises Problem when it exceeds a limit."""
        if self._complete:
            return await self._receive()
        remaining = self._start + self._seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(remaining, 0.001))
        except TimeoutError:
            detail = f"The body was not complete within {self._seconds:g} seconds. Send it faster."
            raise Problem("too-slow", detail) from None
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self._received += size
        self._complete = not message.get("more_body", False)
        if self._received > self._limit:
            raise Problem("too-large", f"The body has over {self._limit} bytes. Send a smaller one.")
        elapsed = time.monotonic() - self._start
        if not self._complete and elapsed > GRACE_S and self._received < MIN_RATE * elapsed:
            raise Problem("too-slow", f"The body arrives at under {MIN_RATE} bytes/s. Send it faster.")
        if self._received > SMALL_BODY_BYTES:
            await self._require_token()
        if not self._upload:
            self._reserve(min(size, max(0, self._received - SMALL_BODY_BYTES)))
            if self._complete and self._limits.proxy:  # the ingress, which receives it next, counts it itself
                self.release()
        if self._rate:
            await asyncio.sleep(max(0.0, self._received / self._rate - elapsed))
        return message

    def _reserve(self, size: int) -> None:
        """Count memory beyond the size of a small body, which is always accepted. Raises Problem `busy`."""
        if not size:
            return
        limits, total = self._limits, MAX_LARGE_BODIES * self._limits.settings.body_limit
        self.held += size
        limits.held += size
        share = self._client or self._address
        limits.shares[share] += size
        if limits.held > total or limits.shares[share] > total // 2:
            detail = "Too many large bodies are arriving at once. Try again."
            raise Problem("busy", detail, retry_after=2)

    def release(self) -> None:
        """Stop counting the memory of this body."""
        share = self._client or self._address
        self._limits.held -= self.held
        self._limits.shares[share] -= self.held
        self.held = 0
        if not self._limits.shares[share]:
            del self._limits.shares[share]


async def send_problem(problem: Problem, send: Send, *, proxy: bool = False) -> None:
    """Send a problem document and close the connection, so that the rest of the body is not read.

    Args:
        problem: the problem.
        send: ASGI send.
        proxy: add the header that marks a refusal inside Ray's proxy.
    """
    body = json.dumps(problem.document()).encode()
    headers = [
        (b"content-type", MEDIA.encode()), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]  # fmt: skip
    if proxy:
        headers.append((PROXY_HEADER.encode(), b"proxy"))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(problem.retry_after))).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_redirect(send: Send) -> None:
    headers = [(b"location", b"/"), (b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def proxy_middlewares() -> list[Middleware]:
    """Return the middleware of Ray's proxy. This module imports little, so that the proxy starts in time."""
    metrics.configure_logging()

    def count(kind: str) -> None:
        metrics.log_event("body_refused", reason=kind)

    settings = ServiceSettings.load()
    # The database is on the head node. The proxy of another node counts shares by address.
    identify = partial(token_id_of_request, TokenReader(settings.state_dir / FILE_NAME))
    return [Middleware(BodyLimitMiddleware, settings=settings, proxy=True, count=count, identify=identify)]
