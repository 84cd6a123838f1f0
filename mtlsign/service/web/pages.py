"""Web pages: forms and links that need no script, usable from the keyboard.

A token is exchanged for a session in a cookie (HttpOnly, SameSite=Strict). Forms are accepted only from this
service's own pages (Origin). The script shows the progress of an upload and copies ids.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlencode, urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup

from mtlsign.reports.formatting import format_p
from mtlsign.service import metrics
from mtlsign.service.auth import tokens
from mtlsign.service.auth.request_tokens import session_cookie, uses_https
from mtlsign.service.auth.tokens import Token
from mtlsign.service.fetch.locations import MAX_LOCATION
from mtlsign.service.http.body_limits import release_body
from mtlsign.service.http.routes import ENVELOPE, signed_verdict
from mtlsign.service.problems import KINDS, Problem
from mtlsign.service.state import AppState, get_state
from mtlsign.service.web.charts import null_distribution_svg, required_matches
from mtlsign.service.web.forms import parse_form
from mtlsign.service.web.history import recent_requests
from mtlsign.service.web.rendering import SECURITY_HEADERS, render
from mtlsign.service.web.uploads import FIELDS, receive_files
from mtlsign.storage.json_io import parse_bounded_json
from mtlsign.watermark.verification.verdict import Verdict

router = APIRouter(include_in_schema=False)
#: Allowed prefixes of locations that the form shows.
MAX_PREFIXES = 3
#: A longer opened claim is not repeated in the form after an error.
MAX_ECHO_BYTES = 2**18


def _redirect(address: str) -> RedirectResponse:
    return RedirectResponse(address, 303, headers=SECURITY_HEADERS)


async def current_user(request: Request) -> tuple[AppState, Token | None]:
    """Return the state and the token of the session, if there is a valid one."""
    state = get_state(request)
    token = await asyncio.to_thread(
        tokens.token_of_session, state.database, request.cookies.get(session_cookie(state.settings))
    )
    if token is not None:
        request.state.token = token.id  # for the log
    return state, token


def _require_own_form(request: Request) -> None:
    """Raise Problem `forbidden` if a form of another site sent the request."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        raise Problem("forbidden", "The form was sent from another site. Open the page of this service.")


async def form_fields(request: Request) -> dict[str, str]:
    """Return the fields of a form of this service. Raises Problem."""
    _require_own_form(request)
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
    """Show the forms for a claim, with the locations of the query, or the sign-in form without a session."""
    state, token = await current_user(request)
    if token is None:
        return render("sign_in", token=None, wrong="")
    model, bundle = (request.query_params.get(name, "")[:MAX_LOCATION] for name in FIELDS)
    return await _render_claim_form(state, token, model=model, bundle=bundle)


async def _render_claim_form(
    state: AppState, token: Token, *, status: int = 200, wrong: str = "", model: str = "", bundle: str = ""
) -> HTMLResponse:
    """Render the forms for a claim with the token's recent requests."""
    settings = state.settings
    limits = {
        "model": settings.max_model_mb, "bundle": settings.max_bundle_mb,
        "hours": f"{settings.upload_ttl_hours:g}", "days": f"{settings.retention_days:g}",
    }  # fmt: skip
    history = await asyncio.to_thread(recent_requests, state.database, token.id)
    return render(
        "new_claim", status=status, token=token, wrong=wrong, model=model, bundle=bundle, limits=limits,
        history=history, prefixes=settings.allowed_locations[:MAX_PREFIXES],
        uploaded=not wrong and model.startswith("sha256:") and bundle.startswith("sha256:"),
    )  # fmt: skip


@router.post("/uploads")
async def upload_files(request: Request) -> Response:
    """Store the files of a form and return to the form for a claim, with their locations."""
    state, token = await current_user(request)
    if token is None:
        return _redirect("/")
    _require_own_form(request)
    token.require_scope("verify")
    return _redirect(f"/?{urlencode(await receive_files(request, state, token))}")


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
    response.set_cookie(
        session_cookie(state.settings), secret, max_age=int(tokens.SESSION_S), path="/",
        httponly=True, samesite="strict", secure=uses_https(state.settings),
    )  # fmt: skip
    return response


@router.post("/leave")
async def sign_out(request: Request) -> Response:
    """End the session."""
    await form_fields(request)
    state = get_state(request)
    await asyncio.to_thread(
        tokens.close_session, state.database, request.cookies.get(session_cookie(state.settings))
    )
    response = _redirect("/")
    response.delete_cookie(
        session_cookie(state.settings), path="/", httponly=True, samesite="strict",
        secure=uses_https(state.settings),
    )  # fmt: skip
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
            return await _render_claim_form(
                state, token, status=problem.status, wrong=problem.detail, model=model[:MAX_LOCATION],
                bundle=text if len(text) <= MAX_ECHO_BYTES else "",
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
    tone = {"accepted": "good", "rejected": "bad", "unrelated": "bad"}.get(verdict.status, "open")
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
