"""The page for people: plain forms and links, rendered here; it works without a script and from the keyboard.

A token is exchanged for a session in a cookie (HttpOnly, SameSite=Strict); forms are taken only from this
very page (Origin). The content security policy allows this service's own style sheet and nothing else.
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

from mtlsign.reports.embedding import format_p
from mtlsign.service import metrics
from mtlsign.service.auth import tokens
from mtlsign.service.auth.tokens import Token
from mtlsign.service.fetch.locations import MAX_POINTER
from mtlsign.service.http.body_limits import release_body
from mtlsign.service.http.routes import ENVELOPE, signed
from mtlsign.service.json_input import read_form, read_json
from mtlsign.service.problems import KINDS, Problem
from mtlsign.service.state import AppState, get_state
from mtlsign.service.web.charts import matches_needed, null_distribution_svg
from mtlsign.watermark.verification.detector import Verdict

router = APIRouter(include_in_schema=False)
COOKIE = "mtlsign_session"
#: A longer opened claim is not shown again in the form when it was wrong.
MAX_ECHO_BYTES = 2**18
SECURE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with Origin: null
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.PackageLoader("mtlsign.service.web", "templates"),
    )  # fmt: skip
    made.filters["when"] = _when
    return made


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "not yet attested"
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(seconds))


def render(name: str, *, status: int = 200, refresh: bool = False, **values: Any) -> HTMLResponse:
    """One page."""
    text = _templates().get_template(f"{name}.html.j2").render(refresh=refresh, **values)
    return HTMLResponse(text, status, headers=SECURE)


async def current_user(request: Request) -> tuple[AppState, Token | None]:
    """The office and whoever's session this is."""
    office = get_state(request)
    token = await asyncio.to_thread(tokens.session, office.store, request.cookies.get(COOKIE))
    if token is not None:
        request.state.token = token.id  # for the log
    return office, token


async def form_fields(request: Request) -> dict[str, str]:
    """The fields of a form that this page sent. Raises Problem."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        raise Problem("forbidden", "this form was sent from another site; open this service's own page")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem("wrong-media-type", "forms are sent as application/x-www-form-urlencoded")
    try:
        return await asyncio.to_thread(read_form, await request.body())
    except ValueError:
        raise Problem("malformed-request", "the form cannot be read") from None


@router.get("/")
async def home(request: Request) -> HTMLResponse:
    """The form, or the door before it."""
    _, token = await current_user(request)
    return render("new_claim" if token else "sign_in", token=token, wrong="", model="", bundle="")


@router.post("/session")
async def sign_in(request: Request) -> Response:
    """Exchange a token for a session."""
    office = get_state(request)
    given = (await form_fields(request)).get("token", "")
    try:
        secret = await asyncio.to_thread(tokens.open_session, office.store, given)
    except Problem as problem:
        return render("sign_in", status=problem.status, token=None, wrong=problem.detail)
    answer = RedirectResponse("/", 303, headers=SECURE)
    secure = office.settings.public_url.startswith("https://") or office.settings.tls_cert is not None
    answer.set_cookie(
        COOKIE, secret, max_age=int(tokens.SESSION_S), httponly=True, samesite="strict", secure=secure
    )
    return answer


@router.post("/leave")
async def sign_out(request: Request) -> Response:
    """End the session."""
    await form_fields(request)
    office = get_state(request)
    await asyncio.to_thread(tokens.close_session, office.store, request.cookies.get(COOKIE))
    answer = RedirectResponse("/", 303, headers=SECURE)
    answer.delete_cookie(COOKIE)
    return answer


@router.post("/checks")
async def create_verification(request: Request) -> Response:
    """Take one claim and lead to its page."""
    office, token = await current_user(request)
    if token is None:
        return RedirectResponse("/", 303, headers=SECURE)
    await request.body()
    async with office.heavy:
        fields = await form_fields(request)
        model, text = fields.get("model", "").strip(), fields.get("bundle", "").strip()
        try:
            token.need("verify")
            bundle: object = text
            if text.startswith("{"):
                try:
                    bundle = await asyncio.to_thread(read_json, text.encode())
                except ValueError:
                    detail = "the opened claim is no JSON; paste the whole of it"
                    raise Problem("bad-bundle", detail) from None
            if not model or not text:
                raise Problem("bad-claim", "both fields are needed")
            job = await office.desk.submit(token, [{"model": model, "bundle": bundle}], None)
        except Problem as problem:
            return render(
                "new_claim", status=problem.status, token=token, wrong=problem.detail,
                model=model[:MAX_POINTER], bundle=text if len(text) <= MAX_ECHO_BYTES else "",
            )  # fmt: skip
    del fields, bundle, text
    release_body(request.scope)
    await office.desk.wait(job, 1.0)
    return RedirectResponse(f"/checks/{job.id}", 303, headers=SECURE)


@router.get("/checks/{name}")
async def show_verification(request: Request, name: str) -> Response:
    """One request: what is known of it so far."""
    office, token = await current_user(request)
    if token is None:
        return RedirectResponse("/", 303, headers=SECURE)
    try:
        job = await asyncio.to_thread(office.store.job, name[:64], token.id)
    except Problem as problem:
        return render("error", status=problem.status, token=token, problem=problem.document())
    found = await asyncio.to_thread(office.store.outcomes, job.id)
    read = office.ledger.ask if office.ledger is not None else asyncio.to_thread
    results = [await read(_result, office, found.get(at), f"{job.id}.{at}") for at in range(job.count)]
    done = job.finished is not None
    heading = "Verdict" if any(r and "verdict" in r for r in results) else "Not answered"
    return render(
        "verification", refresh=not done, token=token, job=job, done=done, results=results,
        heading=heading if done else "Verifying…",
    )  # fmt: skip


def _result(office: AppState, outcome: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    if outcome is None or "problem" in outcome:
        return outcome
    fields = outcome["verdict"]
    verdict = Verdict(**fields)
    facts: dict[str, Any] | None = None
    if outcome.get("claim") and office.ledger is not None:
        try:
            facts = office.ledger.claim(outcome["claim"])
            facts["other"] = facts["suspect"] != fields["model_digest"]
            if facts["key"] != outcome["key"]:  # anybody can name anybody's claim
                facts = None
        except Problem as problem:
            metrics.log_event("ledger_unread", reason=problem.kind)
    needed = matches_needed(verdict.n, verdict.bits_required) if verdict.statistic == "count" else None
    tone = {"accepted": "good", "rejected": "bad"}.get(verdict.status, "open")
    seen = verdict.status != "not_verifiable"
    picture = null_distribution_svg(verdict.matches, verdict.n, needed) if seen else ""
    return {
        "id": name, "verdict": fields, "tone": tone, "sentence": verdict.summary(), "needed": needed,
        "facts": facts, "picture": picture,
        "p": _format_power(fields["evidence_bits"]), "key": outcome["key"],
    }  # fmt: skip


def _format_power(bits: float | None) -> Markup:
    base, caret, exponent = format_p(bits).partition("^")
    raised = Markup("<sup>{}</sup>").format(exponent.replace("-", "−"))
    return Markup.escape(base) + (raised if caret else "")


@router.get("/verdicts/{name}")
async def download(request: Request, name: str) -> Response:
    """The signed verdict as a file."""
    office, token = await current_user(request)
    if token is None:
        return RedirectResponse("/", 303, headers=SECURE)
    envelope = await asyncio.to_thread(signed, office, token, name)
    attached = {"Content-Disposition": f'attachment; filename="verdict-{name[:8]}.dsse.json"'}
    return Response(envelope, media_type=ENVELOPE, headers={**SECURE, **attached})


@router.get("/ledger")
async def ledger(request: Request) -> Response:
    """The newest entries of the ledger."""
    office, token = await current_user(request)
    if token is None:
        return RedirectResponse("/", 303, headers=SECURE)
    try:
        token.need("ledger")
        desk = office.need_ledger()
        head, entries = await desk.ask(desk.head), await desk.ask(desk.recent)
    except Problem as problem:
        return render("error", status=problem.status, token=token, problem=problem.document())
    return render("ledger", token=token, head=head, entries=entries)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The interface for programs, drawn here: the usual viewer runs another site's script beside sessions."""
    _, token = await current_user(request)
    routes = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, said in methods.items():
            content = said.get("requestBody", {}).get("content", {}).get("application/json")
            codes = sorted(int(code) for code in said["responses"])
            routes.append({
                "method": method.upper(), "path": path, "text": said.get("description", ""),
                "body": json.dumps(content["schema"], indent=2) if content else "",
                "good": [c for c in codes if c < 300], "bad": [c for c in codes if c >= 300],
            })  # fmt: skip
    return render("api_docs", token=token, routes=routes, kinds=KINDS)


@router.get("/style.css")
async def style() -> Response:
    """The style sheet."""
    text = resources.files("mtlsign.service.web").joinpath("templates", "style.css").read_text("utf-8")
    return Response(text, media_type="text/css", headers={**SECURE, "Cache-Control": "max-age=3600"})


@router.get("/icon.svg")
async def icon() -> Response:
    """The page's mark in a tab."""
    text = resources.files("mtlsign.service.web").joinpath("templates", "icon.svg").read_text("utf-8")
    return Response(text, media_type="image/svg+xml", headers={**SECURE, "Cache-Control": "max-age=86400"})
