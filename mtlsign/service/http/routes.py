"""Programming interface under `/v1/`. Every error is an RFC 9457 problem document."""

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
from mtlsign.service.http.request_models import M, TokenRequest, VerificationRequest, parse_request
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
from mtlsign.service.problems import MEDIA, Problem
from mtlsign.service.state import AppState, get_state
from mtlsign.storage.json_io import parse_bounded_json

router = APIRouter(prefix="/v1")
_JOB_ID = re.compile(r"[0-9a-f]{32}")
_RESULT_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,4})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,128}")
ENVELOPE = "application/vnd.in-toto+json"


async def authenticate(request: Request, scope: str) -> tuple[AppState, Token]:
    """Return the state and the caller's token, which has `scope`. Raises Problem."""
    state = get_state(request)
    header = request.headers.get("authorization")
    token = await asyncio.to_thread(tokens.token_of_header, state.database, header)
    request.state.token = token.id  # for the log
    token.require_scope(scope)
    return state, token


async def json_body(request: Request, model: type[M], data: bytes | None = None) -> M:
    """Parse and validate a JSON body, whose size `body_limits` has checked. Raises Problem.

    Args:
        request: the request.
        model: model of the body.
        data: the body, if it was already received.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem("wrong-media-type", "The body is not JSON. Send application/json.")
    data = await request.body() if data is None else data
    try:
        value = await asyncio.to_thread(parse_bounded_json, data)
    except ValueError:
        detail = "The body is not UTF-8 JSON with unique fields, finite numbers and at most 200,000 values."
        raise Problem("malformed-request", detail) from None
    if not isinstance(value, dict):
        raise Problem("malformed-request", "The body is not a JSON object. Send an object.")
    return parse_request(model, value)


@router.post("/verifications", **with_body(VERIFY, VERIFY_BODY))
async def verify(request: Request) -> JSONResponse:
    """Verify 1 to 256 claims. Results are in claim order; 202 if some are missing after `wait_s`."""
    state, token = await authenticate(request, "verify")
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise Problem("malformed-request", "An Idempotency-Key has 1 to 128 printable ASCII characters.")
    data = b"".join([piece async for piece in request.stream()])  # `request.body` would keep it in memory
    # A parsed body takes several times its size: large ones are parsed one at a time.
    async with state.large_body_lock if len(data) > MIB else nullcontext():
        body = await json_body(request, VerificationRequest, data)
        wait_s = body.wait_s
        job = await state.queue.submit(token, body.claims, key)
        del data, body
    release_body(request.scope)
    job = await state.queue.wait(job, min(wait_s, state.settings.max_wait_s))
    return _job_response(await state.queue.document(job))


def _job_response(document: dict[str, Any]) -> JSONResponse:
    if document["state"] == "done":
        return JSONResponse(document)
    address = f"/v1/verifications/{document['id']}"
    return JSONResponse(document, 202, headers={"Location": address, "Retry-After": "1"})


@router.get("/verifications/{name}", **VERIFY)
async def verification(request: Request, name: str) -> JSONResponse:
    """Return a request of this token and its results so far; 202 while some are missing."""
    state, token = await authenticate(request, "verify")
    if not _JOB_ID.fullmatch(name):
        raise Problem("not-found", "This token has no request of that id.")
    job = await asyncio.to_thread(state.database.job, name, token.id)
    return _job_response(await state.queue.document(job))


@router.get("/verdicts/{name}", **VERDICTS)
async def verdict(request: Request, name: str) -> Response:
    """Return the signed verdict of one claim (a DSSE envelope); `name` is the id of a result."""
    state, token = await authenticate(request, "verify")
    envelope = await asyncio.to_thread(signed_verdict, state, token, name)
    return Response(envelope, media_type=ENVELOPE)


def signed_verdict(state: AppState, token: Token, name: str) -> bytes:
    """Return the envelope of a verdict of that token.

    Args:
        state: state of the service.
        token: the caller's token.
        name: id of the result.

    Raises:
        Problem: `not-found`.
    """
    match = _RESULT_ID.fullmatch(name)
    if match:
        state.database.job(match[1], token.id)
        envelope = state.database.envelope(match[1], int(match[2]))
        if envelope is not None:
            return envelope
    raise Problem("not-found", "This token has no verdict of that id.")


@router.put("/models/{sha256}", **with_body(UPLOADS, UPLOAD_BODY))
async def upload(request: Request, sha256: str) -> JSONResponse:
    """Upload a model or bundle. Its SHA-256 is checked; `sha256:HEX` is then its location."""
    state, token = await authenticate(request, "verify")
    if not _DIGEST.fullmatch(sha256):
        detail = "The path must end in the SHA-256 of the file, 64 lower-case hexadecimal digits."
        raise Problem("malformed-request", detail)
    announced = request.headers.get("content-length")
    if announced is None:
        raise Problem("malformed-request", "The length of the body is unknown. Send Content-Length.")
    size, database, settings = int(announced), state.database, state.settings
    seconds, quota = settings.upload_timeout_s + 60, settings.upload_quota_mb * MIB
    ticket = await asyncio.to_thread(database.reserve_upload, token.id, size, seconds, quota)
    try:
        await _receive_upload(request, state, sha256, size)
        expires = database.clock() + settings.upload_ttl_hours * 3600
        await asyncio.to_thread(database.add_upload, ticket, sha256, size, expires)
    except BaseException:  # a client that has not sent the bytes must not be able to use their digest
        await asyncio.to_thread(database.cancel_upload, ticket)
        raise
    metrics.log_event("uploaded", token=token.id, sha256=sha256, size=size)
    return JSONResponse(_upload_document(sha256, size, expires), 201)


async def _receive_upload(request: Request, state: AppState, sha256: str, size: int) -> None:
    """Store the body of an upload after checking its size and digest. Raises Problem."""
    with state.uploads.pending_file() as file:
        async for piece in request.stream():
            if file.size + len(piece) > size:
                raise _wrong_size(f"over {size}", size)
            await asyncio.to_thread(file.write, piece)
        if file.size != size:
            raise _wrong_size(str(file.size), size)
        if file.digest != sha256:
            detail = f"The bytes have the SHA-256 {file.digest}. Use that digest, or send the right file."
            raise Problem("wrong-digest", detail)
        await asyncio.to_thread(file.commit)


def _wrong_size(received: str, announced: int) -> Problem:
    detail = f"The body has {received} bytes, but {announced} were announced. Send the exact length."
    return Problem("malformed-request", detail)


def _upload_document(sha256: str, size: int, expires: float) -> dict[str, Any]:
    return {"sha256": sha256, "model": f"sha256:{sha256}", "size": size, "expires": expires}


@router.get("/models/{sha256}", **UPLOADS)
async def uploaded(request: Request, sha256: str) -> JSONResponse:
    """Return size and expiry of an upload of this token."""
    state, token = await authenticate(request, "verify")
    record = None
    if _DIGEST.fullmatch(sha256):
        record = await asyncio.to_thread(state.database.upload, token.id, sha256)
    if record is None or not state.uploads.has(sha256):
        raise Problem("not-found", "This token has no upload of that digest. Upload the file.")
    return JSONResponse(_upload_document(sha256, *record))


@router.get("/keys", **LEDGER)
async def keys(request: Request) -> JSONResponse:
    """Return the public keys that sign verdicts, the current one first, and the ledger entry of each."""
    return JSONResponse({"keys": await get_state(request).signing_keys()})


@router.get("/ledger/head", **LEDGER)
async def head(request: Request) -> JSONResponse:
    """Return the newest confirmed checkpoint, with its co-signatures as a signed note."""
    state, _ = await authenticate(request, "ledger")
    ledger = state.require_ledger()
    return JSONResponse(await ledger.run(ledger.head))


@router.get("/ledger/entries/{index}", **LEDGER)
async def entry(request: Request, index: str) -> JSONResponse:
    """Return one entry; `envelope` is the base64 of its exact bytes."""
    state, _ = await authenticate(request, "ledger")
    ledger = state.require_ledger()
    return JSONResponse(await ledger.run(ledger.entry, _index(index)))


@router.get("/ledger/proofs/{index}", **LEDGER)
async def proof(request: Request, index: str) -> JSONResponse:
    """Return the RFC 6962 inclusion proof of an entry; `?size=` selects the tree."""
    state, _ = await authenticate(request, "ledger")
    text = request.query_params.get("size")
    size = None if text is None else _index(text)
    ledger = state.require_ledger()
    return JSONResponse(await ledger.run(ledger.proof, _index(index), size))


def _index(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,13}", text):
        raise Problem("not-found", "Entries have whole numbers as names. Use the index of an entry.")
    return int(text)


@router.get("/tokens", **TOKENS)
async def list_tokens(request: Request) -> JSONResponse:
    """Return all tokens without their secrets (scope admin)."""
    state, _ = await authenticate(request, "admin")
    return JSONResponse({"tokens": await asyncio.to_thread(tokens.list_tokens, state.database)})


@router.post("/tokens", **with_body(TOKENS, TOKENS_BODY))
async def create_token(request: Request) -> JSONResponse:
    """Create a token (scope admin). Its text is returned only once."""
    state, token = await authenticate(request, "admin")
    body = await json_body(request, TokenRequest)
    hours = body.hours if "hours" in body.model_fields_set else state.settings.token_ttl_hours
    text = await asyncio.to_thread(tokens.issue, state.database, body.name, body.scopes, hours)
    token_id = text.split("_")[1]
    metrics.log_event("token_created", by=token.id, token=token_id)
    return JSONResponse({"token": text, "id": token_id}, 201)


@router.delete("/tokens/{name}", **TOKENS)
async def revoke_token(request: Request, name: str) -> Response:
    """Revoke a token (scope admin)."""
    state, token = await authenticate(request, "admin")
    if not await asyncio.to_thread(tokens.revoke, state.database, name[:64]):
        raise Problem("not-found", "No valid token has this id.")
    metrics.log_event("token_revoked", by=token.id, token=name[:64])
    return Response(status_code=204)


def problem_response(problem: Problem) -> JSONResponse:
    """Return a problem as an HTTP response."""
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(problem.retry_after)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.document(), problem.status, headers=headers, media_type=MEDIA)
