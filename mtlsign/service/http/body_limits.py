"""Bounds on bodies, as ASGI middleware: bytes, seconds, pace, and all bodies together.

It stands before the app, and, because Ray's HTTP proxy reads a body as fast as it comes, whatever becomes of
it, also inside that proxy (`proxy_middlewares`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.service import metrics
from mtlsign.service.problems import MEDIA, Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Only these take a body of `max_body_mb`; every other one is short.
_LARGE = ("/v1/verifications", "/checks")
SMALL_BODY_BYTES = 16 * 1024
_UPLOAD = re.compile(r"/v1/models/[^/]+")
#: Header of a refusal: by Ray's proxy, before it read the body.
PROXY_HEADER = "x-mtlsign-bounded"
RELEASE = "mtlsign.release"
#: Bodies of the largest size that are held at once, all together; one peer has half of that at most.
MAX_LARGE_BODIES = 4
GRACE_S = 5.0
SLOWEST = 1024
"""Bytes a second that a body must have on average after the grace period."""


class BodyLimitMiddleware:
    """Wraps an ASGI app.

    Args:
        app: what is behind.
        s: the limits.
        proxy: inside Ray's proxy: hold uploads back to `upload_mb_s`, as the proxy itself never does, and
            make a 503 with Retry-After of an ingress that is not there or dies, of which Ray makes a 500.
        count: called with the kind of each refusal.
    """

    def __init__(
        self,
        app: App,
        settings: ServiceSettings,
        proxy: bool = False,
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.app, self.settings, self.proxy, self.count, self.held = app, settings, proxy, count, 0
        self.shares: Counter[str] = Counter()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = refused = False

        async def tell(message: Message) -> None:
            nonlocal started
            if not refused:
                if message["type"] == "http.response.start":
                    started = True
                    bound.release()
                    headers = [*message["headers"]]
                    names = {name.lower() for name, _ in headers}
                    if self.proxy and message["status"] == 503 and b"retry-after" not in names:
                        headers.append((b"retry-after", b"2"))  # Ray's own, without an ingress
                    if bound.unread and b"connection" not in names:
                        headers.append((b"connection", b"close"))  # or the rest could drip on for ever
                    message = {**message, "headers": headers}
                await send(message)

        async def receive_for_proxy() -> Message:
            """Ray's proxy makes a 500 of what is raised here: answer in its stead and end."""
            nonlocal refused
            try:
                return await bound.receive()
            except Problem as problem:
                self.count(problem.kind)
                if not started:
                    await send_problem(problem, send, proxy=self.proxy)
                refused = True
                return {"type": "http.disconnect"}

        bound = _LimitedBody(self, scope, receive)
        if not self.proxy:  # Ray's proxy pickles the scope
            scope[RELEASE] = bound.release
        try:
            bound.check_length()
            await self.app(scope, receive_for_proxy if self.proxy else bound.receive, tell)
            if self.proxy and not started and not refused:  # the ingress died with the request in hand
                raise Problem("not-ready", "the service lost this request; send it again", retry_after=2)
        except Problem as problem:
            self.count(problem.kind)
            if not started:
                await send_problem(problem, send, proxy=self.proxy)
        finally:
            bound.release()


def release_body(scope: MutableMapping[str, Any]) -> None:
    """Say that the request's body is parsed and no longer held, though its answer is yet to come."""
    scope.get(RELEASE, lambda: None)()


def _peer(scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> str:
    """Whose share a body is counted in: the address's, or, behind a proxy on this machine, the token's."""
    host = str((scope.get("client") or ("",))[0])
    if host in ("127.0.0.1", "::1", ""):
        return hashlib.sha256(headers.get(b"authorization", b"")).hexdigest()
    return host


class _LimitedBody:
    """One body."""

    def __init__(
        self, limits: BodyLimitMiddleware, scope: MutableMapping[str, Any], receive: Receive
    ) -> None:
        s = limits.settings
        self._limits, self._receive = limits, receive
        self._headers = {k.lower(): v for k, v in scope.get("headers", ())}
        self._upload = scope["method"] == "PUT" and bool(_UPLOAD.fullmatch(scope["path"]))
        short = scope["method"] != "POST" or scope["path"] not in _LARGE
        self._most = s.model_limit if self._upload else SMALL_BODY_BYTES if short else s.body_limit
        self._seconds = s.upload_s if self._upload else s.body_s
        self._pace = s.upload_mb_s * MIB if self._upload and limits.proxy else 0.0
        self._start, self._seen, self._ended, self.held = time.monotonic(), 0, False, 0
        self._peer = _peer(scope, self._headers)

    @property
    def unread(self) -> bool:
        """Whether more of the body is to come."""
        announced = self._headers.get(b"content-length", b"0") != b"0"
        return not self._ended and (announced or b"transfer-encoding" in self._headers)

    def check_length(self) -> None:
        text = self._headers.get(b"content-length", b"0")
        if not text.isdigit() or len(text) > 15:
            raise Problem("malformed-request", "Content-Length is no number")
        if int(text) > self._most:
            raise Problem("too-large", f"{int(text)} bytes were announced, {self._most} are allowed here")
        if self._headers.get(b"content-encoding", b"identity") != b"identity":
            raise Problem("wrong-media-type", "compressed bodies are not read; send the plain bytes")

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()
        left = self._start + self._seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except TimeoutError:
            raise Problem("too-slow", f"the body did not come within {self._seconds:g} seconds") from None
        if message["type"] != "http.request":
            return message
        size = len(message.get("body", b""))
        self._seen += size
        self._ended = not message.get("more_body", False)
        if self._seen > self._most:
            raise Problem("too-large", f"over {self._most} bytes came; that many are allowed here")
        passed = time.monotonic() - self._start
        if not self._ended and passed > GRACE_S and self._seen < SLOWEST * passed:
            raise Problem("too-slow", f"the body comes with under {SLOWEST} bytes a second")
        if not self._upload:
            self._hold(min(size, max(0, self._seen - SMALL_BODY_BYTES)))
            if self._ended and self._limits.proxy:  # on its way to the ingress, which counts for itself
                self.release()
        if self._pace:
            await asyncio.sleep(max(0.0, self._seen / self._pace - passed))
        return message

    def _hold(self, size: int) -> None:
        """Count what is held beyond a short body's size, which is always taken."""
        limits, one = self._limits, self._limits.settings.body_limit
        self.held += size
        limits.held += size
        limits.shares[self._peer] += size
        if limits.held > MAX_LARGE_BODIES * one or limits.shares[self._peer] > MAX_LARGE_BODIES * one // 2:
            raise Problem("busy", "too many bodies are coming in at once; try again", retry_after=2)

    def release(self) -> None:
        """Nothing of the body is held any more."""
        self._limits.held -= self.held
        self._limits.shares[self._peer] -= self.held
        self.held = 0
        if not self._limits.shares[self._peer]:
            del self._limits.shares[self._peer]


async def send_problem(problem: Problem, send: Send, *, proxy: bool = False) -> None:
    """Answer with a problem, and close: the rest of the body is not wanted. Ray's proxy says who it is."""
    body = json.dumps(problem.document()).encode()
    headers = [
        (b"content-type", MEDIA.encode()), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]  # fmt: skip
    if proxy:
        headers.append((PROXY_HEADER.encode(), b"proxy"))
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(max(1, round(problem.retry_after))).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def proxy_middlewares() -> list[Middleware]:
    """What Ray's proxy runs before it reads a body. This module is light: the proxy has seconds to start."""
    metrics.configure_logging()

    def count(kind: str) -> None:
        metrics.log_event("refused", reason=kind)

    return [Middleware(BodyLimitMiddleware, settings=ServiceSettings.load(), proxy=True, count=count)]
