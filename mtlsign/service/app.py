"""The service as one ASGI application: routes, problem documents, body limits and health checks."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mtlsign.service import metrics
from mtlsign.service.auth.request_tokens import token_id_of_request
from mtlsign.service.http import routes
from mtlsign.service.http.body_limits import BodyLimitMiddleware
from mtlsign.service.http.schemas import problems
from mtlsign.service.problems import Problem
from mtlsign.service.state import AppState
from mtlsign.service.web import pages, rendering

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
#: Status in the log for a client that closed its connection before its body was complete (as in nginx).
CLIENT_CLOSED_REQUEST = 499
_KIND_OF_STATUS = {404: "not-found", 405: "wrong-method", 413: "too-large", 415: "wrong-media-type"}


def make_app(state: AppState) -> FastAPI:
    """Build the application of one process. Its lifespan starts and stops the queue."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.queue.start()
        if state.ledger is not None and state.settings.publish_signing_key:
            try:
                await state.ledger.run(state.ledger.publish_key, state.keys.current)
            except Problem as problem:
                metrics.log_event("key_not_published", reason=problem.detail)
        yield
        await state.queue.stop()

    app = FastAPI(
        title="MTLSign verification", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Verification of claims, with signed verdicts. Errors are RFC 9457 problem details.",
    )  # fmt: skip
    app.state.service = state
    app.include_router(routes.router)
    app.include_router(pages.router)
    app.include_router(rendering.router)
    app.add_middleware(
        BodyLimitMiddleware,
        settings=state.settings,
        count=lambda kind: state.metrics.add("mtlsign_refusals", 1, kind),
        identify=partial(token_id_of_request, state.database),
    )
    _add_health_checks(app, state)
    _add_error_handlers(app, state)
    _add_request_log(app)
    _describe_security(app)
    return app


def _add_health_checks(app: FastAPI, state: AppState) -> None:
    @app.get("/healthz", responses=problems())
    async def healthz() -> JSONResponse:
        """Liveness: the process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses=problems())
    async def readyz() -> JSONResponse:
        """Readiness: the database can be written and a verifier is available. Otherwise 503."""
        await state.check_writable()
        if not await state.backend.ready():
            raise Problem("not-ready", "No verifier is available yet. Try again later.", retry_after=2)
        return JSONResponse({"status": "ready"})


def _add_error_handlers(app: FastAPI, state: AppState) -> None:
    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        state.metrics.add("mtlsign_refusals", 1, problem.kind)
        if _wants_html(request):
            return rendering.render("error", status=problem.status, token=None, problem=problem.document())
        return routes.problem_response(problem)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        kind = _KIND_OF_STATUS.get(error.status_code, "malformed-request")
        detail = f"{request.method} is not served at this address. See /docs."
        return await on_problem(request, Problem(kind, detail))

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        metrics.log_event("client_disconnected", method=request.method)
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the log; the client receives nothing

    @app.exception_handler(sqlite3.OperationalError)
    @app.exception_handler(OSError)
    async def on_disk_error(request: Request, error: Exception) -> Response:
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS:
            return await on_unexpected_error(request, error)
        metrics.log_event("write_failed", reason=str(error))
        detail = "The service cannot write its database at the moment. Try again later."
        return await on_problem(request, Problem("busy", detail, retry_after=10))

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> Response:
        metrics.log_exception("internal_error", error)
        detail = "The service failed and logged the failure. Report it to the operator."
        return await on_problem(request, Problem("internal", detail))


def _wants_html(request: Request) -> bool:
    return not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", "")


def _add_request_log(app: FastAPI) -> None:
    @app.middleware("http")
    async def log_request(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        # The pattern of the route, because the path itself may contain an id of a client.
        route = getattr(request.scope.get("route"), "path", None)
        metrics.log_event(
            "request", method=request.method, route=route, status=response.status_code,
            token=getattr(request.state, "token", None),
            seconds=round(time.perf_counter() - start, 4),
        )  # fmt: skip
        return response


def _describe_security(app: FastAPI) -> None:
    """Add the bearer scheme to the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, object]:
        document = generate()
        components = document.setdefault("components", {})
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented extension point
