"""The whole service as one ASGI app: routes, problems, limits, health. It knows nothing of Ray."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mtlsign.service import metrics
from mtlsign.service.http import routes
from mtlsign.service.http.body_limits import BodyLimitMiddleware
from mtlsign.service.http.schemas import problems
from mtlsign.service.problems import Problem
from mtlsign.service.state import AppState
from mtlsign.service.web import pages

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_OF_STATUS = {404: "not-found", 405: "wrong-method", 413: "too-large", 415: "wrong-media-type"}


def make_app(office: AppState) -> FastAPI:
    """The app of one process. Its lifespan starts and stops the desk."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await office.desk.start()
        if office.ledger is not None and office.settings.announce:
            try:
                await office.ledger.ask(office.ledger.announce, office.keys.current)
            except Problem as problem:
                metrics.log_event("not_announced", reason=problem.detail)
        yield
        await office.desk.stop()

    app = FastAPI(
        title="MTLSign verification", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Claims in, signed verdicts out. Errors are RFC 9457 problem details.",
    )  # fmt: skip
    app.state.office = office
    app.include_router(routes.router)
    app.include_router(pages.router)
    app.add_middleware(
        BodyLimitMiddleware,
        settings=office.settings,
        count=lambda kind: office.metrics.add("mtlsign_refusals", 1, kind),
    )

    @app.get("/healthz", responses=problems())
    async def healthz() -> JSONResponse:
        """This process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses=problems())
    async def readyz() -> JSONResponse:
        """Claims would be answered: the file can be written to and a verifier is there. Else 503."""
        await office.writable()
        if not await office.backend.ready():
            raise Problem("not-ready", "no verifier is there yet", retry_after=2)
        return JSONResponse({"status": "ready"})

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        office.metrics.add("mtlsign_refusals", 1, problem.kind)
        if _for_people(request):
            return pages.render("error", status=problem.status, token=None, problem=problem.document())
        return routes.answer_problem(problem)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        kind = _OF_STATUS.get(error.status_code, "malformed-request")
        return await on_problem(request, Problem(kind, f"{request.method} is not served at this address"))

    @app.exception_handler(sqlite3.OperationalError)
    @app.exception_handler(OSError)
    async def on_disk(request: Request, error: Exception) -> Response:
        if isinstance(error, OSError) and error.errno not in _DISK:
            return await on_bug(request, error)
        metrics.log_event("not_written", reason=str(error))
        detail = "the service cannot write its file at the moment; try again later"
        return await on_problem(request, Problem("busy", detail, retry_after=10))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        metrics.log_exception("defect", error)
        return await on_problem(request, Problem("internal", "this is a defect; it was logged"))

    @app.middleware("http")
    async def tell(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        answer = await follow(request)
        route = getattr(request.scope.get("route"), "path", None)  # the pattern, never what stands in it
        metrics.log_event(
            "request", method=request.method, route=route, status=answer.status_code,
            token=getattr(request.state, "token", None),
            seconds=round(time.perf_counter() - start, 4),
        )  # fmt: skip
        return answer

    _describe(app)
    return app


def _for_people(request: Request) -> bool:
    return not request.url.path.startswith("/v1/") and "text/html" in request.headers.get("accept", "")


def _describe(app: FastAPI) -> None:
    """Add the bearer scheme to the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, object]:
        found = made()
        components = found.setdefault("components", {})
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
