"""Web pages: forms and links without scripts, usable from the keyboard.

A token is exchanged for a session in a cookie (HttpOnly, SameSite=Strict). Forms are accepted only from this
service's own pages (Origin). The content security policy allows nothing but the service's own style sheet.
"""

from __future__ import annotations

import asyncio
import json
import time
from functools import lru_cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import jinja2
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup

from mtlsign.reports.formatting import format_p
from mtlsign.service import metrics
from mtlsign.service.auth import tokens
from mtlsign.service.auth.tokens import Token
from mtlsign.service.fetch.locations import MAX_LOCATION
from mtlsign.service.http.body_limits import release_body
from mtlsign.service.http.routes import ENVELOPE, signed_verdict
from mtlsign.service.problems import KINDS, Problem
from mtlsign.service.state import AppState, get_state
from mtlsign.service.web.charts import null_distribution_svg, required_matches
from mtlsign.service.web.forms import parse_form
from mtlsign.storage.json_io import parse_bounded_json
from mtlsign.watermark.verification.verdict import Verdict

router = APIRouter(include_in_schema=False)
COOKIE = "mtlsign_session"
#: A longer opened claim is not repeated in the form after an error.
MAX_ECHO_BYTES = 2**18
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with Origin: null
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.PackageLoader("mtlsign.service.web", "templates"),
    )  # fmt: skip
    environment.filters["when"] = _format_time
    return environment


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "not yet confirmed"
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(seconds))


def render(name: str, *, status: int = 200, refresh: bool = False, **values: Any) -> HTMLResponse:
    """Render one page.

    Args:
        name: template.
        status: HTTP status.
        refresh: whether the page reloads itself.
        values: variables of the template.
    """
    text = _templates().get_template(f"{name}.html.j2").render(refresh=refresh, **values)
    return HTMLResponse(text, status, headers=SECURITY_HEADERS)


def _redirect(address: str) -> RedirectResponse:
    return RedirectResponse(address, 303, headers=SECURITY_HEADERS)


async def current_user(request: Request) -> tuple[AppState, Token | None]:
    """Return the state and the token of the session, if there is a valid one."""
    state = get_state(request)
    token = await asyncio.to_thread(tokens.token_of_session, state.database, request.cookies.get(COOKIE))
    if token is not None:
        request.state.token = token.id  # for the log
    return state, token


async def form_fields(request: Request) -> dict[str, str]:
    """Return the fields of a form of this service. Raises Problem."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        raise Problem("forbidden", "The form was sent from another site. Open the page of this service.")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        detail = "The body is not a form. Send application/x-www-form-urlencoded."
        raise Problem("wrong-media-type", detail)
    try:
        return await asyncio.to_thread(parse_form, await request.body())
    except ValueError:
        raise Problem("malformed-request", "The form cannot be read. Fill it in again.") from None


@router.get("/")
async def home(request: Request) -> HTMLResponse:
    """Show the form for a claim, or the sign-in form without a session."""
    _, token = await current_user(request)
    return render("new_claim" if token else "sign_in", token=token, wrong="", model="", bundle="")


@router.post("/session")
async def sign_in(request: Request) -> Response:
    """Exchange a token for a session."""
    state = get_state(request)
    text = (await form_fields(request)).get("token", "")
    try:
        secret = await asyncio.to_thread(tokens.open_session, state.database, text)
    except Problem as problem:
        return render("sign_in", status=problem.status, token=None, wrong=problem.detail)
    response = _redirect("/")
    secure = state.settings.public_url.startswith("https://") or state.settings.tls_cert is not None
    response.set_cookie(
        COOKIE, secret, max_age=int(tokens.SESSION_S), httponly=True, samesite="strict", secure=secure
    )
    return response


@router.post("/leave")
async def sign_out(request: Request) -> Response:
    """End the session."""
    await form_fields(request)
    state = get_state(request)
    await asyncio.to_thread(tokens.close_session, state.database, request.cookies.get(COOKIE))
    response = _redirect("/")
    response.delete_cookie(COOKIE)
    return response


@router.post("/checks")
async def create_verification(request: Request) -> Response:
    """Submit one claim and redirect to its page."""
    state, token = await current_user(request)
    if token is None:
        return _redirect("/")
    await request.body()
    async with state.large_body_lock:
        fields = await form_fields(request)
        model, text = fields.get("model", "").strip(), fields.get("bundle", "").strip()
        try:
            token.require_scope("verify")
            bundle = await asyncio.to_thread(_parse_bundle, model, text)
            job = await state.queue.submit(token, [{"model": model, "bundle": bundle}], None)
        except Problem as problem:
            return render(
                "new_claim", status=problem.status, token=token, wrong=problem.detail,
                model=model[:MAX_LOCATION], bundle=text if len(text) <= MAX_ECHO_BYTES else "",
            )  # fmt: skip
    del fields, bundle, text
    release_body(request.scope)
    await state.queue.wait(job, 1.0)
    return _redirect(f"/checks/{job.id}")


def _parse_bundle(model: str, text: str) -> object:
    """Return the opened claim of a form, or the text if it is a location. Raises Problem."""
    bundle: object = text
    if text.startswith("{"):
        try:
            bundle = parse_bounded_json(text.encode())
        except ValueError:
            detail = "The opened claim is not JSON. Paste all of it."
            raise Problem("bad-bundle", detail) from None
    if not model or not text:
        raise Problem("bad-claim", "A field is empty. Fill in both fields.")
    return bundle


@router.get("/checks/{name}")
async def show_verification(request: Request, name: str) -> Response:
    """Show the results of one request so far."""
    state, token = await current_user(request)
    if token is None:
        return _redirect("/")
    try:
        job = await asyncio.to_thread(state.database.job, name[:64], token.id)
    except Problem as problem:
        return render("error", status=problem.status, token=token, problem=problem.document())
    outcomes = await asyncio.to_thread(state.database.outcomes, job.id)
    run = state.ledger.run if state.ledger is not None else asyncio.to_thread
    results = [await run(_result, state, outcomes.get(i), f"{job.id}.{i}") for i in range(job.count)]
    finished = job.finished is not None
    heading = "Verdict" if any(r and "verdict" in r for r in results) else "Not answered"
    return render(
        "verification", refresh=not finished, token=token, job=job, finished=finished, results=results,
        heading=heading if finished else "Verifying…",
    )  # fmt: skip


def _result(state: AppState, outcome: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Return the template variables of one result."""
    if outcome is None or "problem" in outcome:
        return outcome
    fields = outcome["verdict"]
    verdict = Verdict(**fields)
    required = None
    if verdict.statistic == "count":
        required = required_matches(verdict.n, verdict.bits_required)
    tone = {"accepted": "good", "rejected": "bad"}.get(verdict.status, "open")
    verifiable = verdict.status != "not_verifiable"
    chart = null_distribution_svg(verdict.matches, verdict.n, required) if verifiable else ""
    return {
        "id": name, "verdict": fields, "tone": tone, "summary": verdict.summary(), "required": required,
        "facts": _ledger_facts(state, outcome), "chart": chart,
        "p": _format_power(fields["evidence_bits"]), "key": outcome["key"],
    }  # fmt: skip


def _ledger_facts(state: AppState, outcome: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of the claim in the ledger, if the ledger has that claim with the same key."""
    if not outcome.get("claim") or state.ledger is None:
        return None
    try:
        facts = state.ledger.claim(outcome["claim"])
    except Problem as problem:
        metrics.log_event("ledger_error", reason=problem.kind)
        return None
    if facts["key"] != outcome["key"]:  # a client can name the claim of another owner
        return None
    return facts | {"other_model": facts["suspect"] != outcome["verdict"]["model_digest"]}


def _format_power(bits: float | None) -> Markup:
    base, caret, exponent = format_p(bits).partition("^")
    raised = Markup("<sup>{}</sup>").format(exponent.replace("-", "−"))
    return Markup.escape(base) + (raised if caret else "")


@router.get("/verdicts/{name}")
async def download(request: Request, name: str) -> Response:
    """Return the signed verdict as a file."""
    state, token = await current_user(request)
    if token is None:
        return _redirect("/")
    envelope = await asyncio.to_thread(signed_verdict, state, token, name)
    attachment = {"Content-Disposition": f'attachment; filename="verdict-{name[:8]}.dsse.json"'}
    return Response(envelope, media_type=ENVELOPE, headers={**SECURITY_HEADERS, **attachment})


@router.get("/ledger")
async def ledger(request: Request) -> Response:
    """Show the newest entries of the ledger."""
    state, token = await current_user(request)
    if token is None:
        return _redirect("/")
    try:
        token.require_scope("ledger")
        reader = state.require_ledger()
        head, entries = await reader.run(reader.head), await reader.run(reader.recent)
    except Problem as problem:
        return render("error", status=problem.status, token=token, problem=problem.document())
    return render("ledger", token=token, head=head, entries=entries)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show the programming interface. The usual viewers would run another site's script in a session."""
    _, token = await current_user(request)
    routes = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            codes = sorted(int(code) for code in operation["responses"])
            routes.append({
                "method": method.upper(), "path": path, "text": operation.get("description", ""),
                "body": json.dumps(content["schema"], indent=2) if content else "",
                "good": [c for c in codes if c < 300], "bad": [c for c in codes if c >= 300],
            })  # fmt: skip
    return render("api_docs", token=token, routes=routes, kinds=KINDS)


def _static(name: str, media_type: str, max_age_s: int) -> Response:
    text = resources.files("mtlsign.service.web").joinpath("templates", name).read_text("utf-8")
    headers = {**SECURITY_HEADERS, "Cache-Control": f"max-age={max_age_s}"}
    return Response(text, media_type=media_type, headers=headers)


@router.get("/style.css")
async def style() -> Response:
    """Return the style sheet."""
    return _static("style.css", "text/css", 3600)


@router.get("/icon.svg")
async def icon() -> Response:
    """Return the icon."""
    return _static("icon.svg", "image/svg+xml", 86_400)
