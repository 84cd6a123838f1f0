"""The interface for programs: `/v1/…`. Every answer that is no success is RFC 9457 problem details."""

from __future__ import annotations

import asyncio
import re
from contextlib import nullcontext
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mtlsign.config.service import MIB
from mtlsign.service import metrics
from mtlsign.service.auth import tokens
from mtlsign.service.auth.tokens import Token
from mtlsign.service.http.body_limits import release_body
from mtlsign.service.http.schemas import (
    LEDGER,
    TOKENS,
    TOKENS_BODY,
    UPLOAD_BODY,
    UPLOADS,
    VERDICTS,
    VERIFY,
    VERIFY_BODY,
    with_body,
)
from mtlsign.service.json_input import read_json
from mtlsign.service.problems import MEDIA, Problem
from mtlsign.service.state import AppState, get_state

router = APIRouter(prefix="/v1")
_ID = re.compile(r"[0-9a-f]{32}")
_VERDICT = re.compile(r"([0-9a-f]{32})\.([0-9]{1,4})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_IDEM = re.compile(r"[\x21-\x7e]{1,128}")
ENVELOPE = "application/vnd.in-toto+json"


async def authenticate(request: Request, scope: str) -> tuple[AppState, Token]:
    """The office and the caller, who has that scope. Raises Problem."""
    office = get_state(request)
    token = await asyncio.to_thread(tokens.bearer, office.store, request.headers.get("authorization"))
    request.state.token = token.id  # for the log
    token.need(scope)
    return office, token


async def json_body(request: Request, raw: bytes | None = None) -> dict[str, Any]:
    """The JSON object in a body (its size is bounded by `limits`). Raises Problem."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem("wrong-media-type", "send application/json")
    try:
        found = await asyncio.to_thread(read_json, await request.body() if raw is None else raw)
    except ValueError:
        detail = "the body is no UTF-8 JSON with each field once and a sane number of values"
        raise Problem("malformed-request", detail) from None
    if not isinstance(found, dict):
        raise Problem("malformed-request", "the body must be a JSON object")
    return found


def reject_unknown_fields(body: dict[str, Any], *names: str) -> None:
    extra = body.keys() - set(names)
    if extra:
        raise Problem("malformed-request", f"unknown field {ascii(sorted(extra)[0])[:60]}")


@router.post("/verifications", **with_body(VERIFY, VERIFY_BODY))
async def verify(request: Request) -> JSONResponse:
    """Verify 1…256 claims. Results are in the claims' order; 202 when they are not all there in time."""
    office, token = await authenticate(request, "verify")
    idem = request.headers.get("idempotency-key")
    if idem is not None and not _IDEM.fullmatch(idem):
        raise Problem("malformed-request", "an Idempotency-Key has 1 to 128 printable ASCII characters")
    raw = b"".join([piece async for piece in request.stream()])  # `request.body` would keep it to the end
    async with office.heavy if len(raw) > MIB else nullcontext():  # parsed, it takes several times its size
        body = await json_body(request, raw)
        reject_unknown_fields(body, "claims", "wait_s")
        claims, wait = body.get("claims"), body.get("wait_s", 10)
        if not isinstance(claims, list):
            raise Problem("malformed-request", "claims must be a list")
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= 3600:
            raise Problem("malformed-request", "wait_s must be a number of seconds from 0 to 3600")
        job = await office.desk.submit(token, claims, idem)
        del raw, body, claims
    release_body(request.scope)
    job = await office.desk.wait(job, min(float(wait), office.settings.max_wait_s))
    return _job(await office.desk.answer(job))


def _job(document: dict[str, Any]) -> JSONResponse:
    if document["state"] == "done":
        return JSONResponse(document)
    place = f"/v1/verifications/{document['id']}"
    return JSONResponse(document, 202, headers={"Location": place, "Retry-After": "1"})


@router.get("/verifications/{name}", **VERIFY)
async def verification(request: Request, name: str) -> JSONResponse:
    """A request of this token and its results so far; 202 while some are missing."""
    office, token = await authenticate(request, "verify")
    if not _ID.fullmatch(name):
        raise Problem("not-found", "this token has no such request")
    job = await asyncio.to_thread(office.store.job, name, token.id)
    return _job(await office.desk.answer(job))


@router.get("/verdicts/{name}", **VERDICTS)
async def verdict(request: Request, name: str) -> Response:
    """The signed verdict of one claim (a DSSE envelope); `name` is a result's id."""
    office, token = await authenticate(request, "verify")
    return Response(await asyncio.to_thread(signed, office, token, name), media_type=ENVELOPE)


def signed(office: AppState, token: Token, name: str) -> bytes:
    """The envelope of one verdict of that token. Raises Problem."""
    found = _VERDICT.fullmatch(name)
    if found:
        office.store.job(found[1], token.id)
        envelope = office.store.envelope(found[1], int(found[2]))
        if envelope is not None:
            return envelope
    raise Problem("not-found", "this token has no such verdict")


@router.put("/models/{sha256}", **with_body(UPLOADS, UPLOAD_BODY))
async def upload(request: Request, sha256: str) -> JSONResponse:
    """Send a model (or a bundle) up, checked against its SHA-256 as it comes; `sha256:HEX` then names it."""
    office, token = await authenticate(request, "verify")
    if not _DIGEST.fullmatch(sha256):
        raise Problem(
            "malformed-request", "the path must end in the file's SHA-256, 64 lower-case hex digits"
        )
    s, shelf = office.settings, office.shelf
    announced = request.headers.get("content-length")
    if announced is None:
        raise Problem("malformed-request", "say how much is coming: Content-Length")
    size, store = int(announced), office.store
    ticket = await asyncio.to_thread(store.reserve, token.id, size, s.upload_s + 60, s.upload_quota_mb * MIB)
    try:
        with shelf.writing() as file:
            async for piece in request.stream():
                if file.size + len(piece) > size:
                    raise Problem("malformed-request", f"over {size} bytes came, {size} were announced")
                await asyncio.to_thread(file.write, piece)
            if file.size != size:
                raise Problem("malformed-request", f"{file.size} bytes came, {size} were announced")
            if file.digest != sha256:
                raise Problem("wrong-digest", f"the bytes that came have the SHA-256 {file.digest}")
            await asyncio.to_thread(file.keep)
        expires = store.clock() + s.upload_hours * 3600
        await asyncio.to_thread(store.add_upload, ticket, sha256, size, expires)
    except BaseException:  # whoever did not send the bytes gets nothing by their digest
        await asyncio.to_thread(store.release, ticket)
        raise
    metrics.log_event("uploaded", token=token.id, sha256=sha256, size=file.size)
    answer = {"sha256": sha256, "model": f"sha256:{sha256}", "size": file.size, "expires": expires}
    return JSONResponse(answer, 201)


@router.get("/models/{sha256}", **UPLOADS)
async def uploaded(request: Request, sha256: str) -> JSONResponse:
    """Whether this token's upload is still there."""
    office, token = await authenticate(request, "verify")
    found = (
        await asyncio.to_thread(office.store.upload, token.id, sha256) if _DIGEST.fullmatch(sha256) else None
    )
    if found is None or not office.shelf.has(sha256):
        raise Problem("not-found", "this token has no such upload")
    return JSONResponse(
        {"sha256": sha256, "model": f"sha256:{sha256}", "size": found[0], "expires": found[1]}
    )


@router.get("/keys", **LEDGER)
async def keys(request: Request) -> JSONResponse:
    """Public halves of the keys that sign verdicts, the current one first, and the ledger's entry of each."""
    office = get_state(request)
    return JSONResponse({"keys": await office.listed()})


@router.get("/ledger/head", **LEDGER)
async def head(request: Request) -> JSONResponse:
    """The newest head that counts, with its co-signatures as a note."""
    office, _ = await authenticate(request, "ledger")
    desk = office.need_ledger()
    return JSONResponse(await desk.ask(desk.head))


@router.get("/ledger/entries/{index}", **LEDGER)
async def entry(request: Request, index: str) -> JSONResponse:
    """One entry; `envelope` are its exact bytes in base64."""
    office, _ = await authenticate(request, "ledger")
    desk = office.need_ledger()
    return JSONResponse(await desk.ask(desk.entry, _number(index)))


@router.get("/ledger/proofs/{index}", **LEDGER)
async def proof(request: Request, index: str) -> JSONResponse:
    """RFC 6962 inclusion proof of an entry; `?size=` chooses the tree."""
    office, _ = await authenticate(request, "ledger")
    size = request.query_params.get("size")
    wanted = None if size is None else _number(size)
    desk = office.need_ledger()
    return JSONResponse(await desk.ask(desk.proof, _number(index), wanted))


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,13}", text):
        raise Problem("not-found", "entries are named by whole numbers")
    return int(text)


@router.get("/tokens", **TOKENS)
async def list_tokens(request: Request) -> JSONResponse:
    """All tokens, without their secrets (scope admin)."""
    office, _ = await authenticate(request, "admin")
    return JSONResponse({"tokens": await asyncio.to_thread(tokens.known, office.store)})


@router.post("/tokens", **with_body(TOKENS, TOKENS_BODY))
async def make_token(request: Request) -> JSONResponse:
    """Make a token (scope admin); its text is shown this once."""
    office, token = await authenticate(request, "admin")
    body = await json_body(request)
    reject_unknown_fields(body, "name", "scopes", "hours")
    name, scopes, hours = body.get("name"), body.get("scopes"), body.get("hours", office.settings.token_hours)
    if (
        not isinstance(name, str)
        or not isinstance(scopes, list)
        or not all(isinstance(x, str) for x in scopes)
    ):
        raise Problem("malformed-request", "give name (text) and scopes (a list of texts)")
    if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 < hours <= 24 * 3650:
        raise Problem("malformed-request", "hours must be a number from 0 to 87600")
    text = await asyncio.to_thread(tokens.issue, office.store, name, scopes, float(hours))
    metrics.log_event("token_made", by=token.id, token=text.split("_")[1])
    return JSONResponse({"token": text, "id": text.split("_")[1]}, 201)


@router.delete("/tokens/{name}", **TOKENS)
async def end_token(request: Request, name: str) -> Response:
    """Revoke a token now (scope admin)."""
    office, token = await authenticate(request, "admin")
    if not await asyncio.to_thread(tokens.revoke, office.store, name[:64]):
        raise Problem("not-found", "there is no such token, or it is revoked already")
    metrics.log_event("token_revoked", by=token.id, token=name[:64])
    return Response(status_code=204)


def answer_problem(problem: Problem) -> JSONResponse:
    """A problem as a response."""
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(problem.retry_after)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.document(), problem.status, headers=headers, media_type=MEDIA)
