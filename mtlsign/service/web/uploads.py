"""Files that a form of the pages sends: a model, a claim file, or both."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from fastapi import Request

from mtlsign.config.service import MIB
from mtlsign.service import metrics
from mtlsign.service.auth.tokens import Token
from mtlsign.service.fetch.content_store import PendingFile
from mtlsign.service.problems import Problem
from mtlsign.service.state import AppState
from mtlsign.service.web.multipart import boundary_of, file_pieces

FIELDS = ("model", "bundle")


async def receive_files(request: Request, state: AppState, token: Token) -> dict[str, str]:
    """Store the files of a multipart form as uploads of the token; return their locations by field.

    Args:
        request: the request.
        state: state of the service.
        token: token of the session.

    Raises:
        Problem: the form is damaged, has no file, or the quota of the token is used up.
    """
    announced = request.headers.get("content-length")
    if announced is None:
        raise Problem("malformed-request", "The length of the body is unknown. Send Content-Length.")
    boundary = boundary_of(request.headers.get("content-type", ""))
    settings, database = state.settings, state.database
    seconds, quota = settings.upload_timeout_s + 60, settings.upload_quota_mb * MIB
    ticket = await asyncio.to_thread(database.reserve_upload, token.id, int(announced), seconds, quota)
    with ExitStack() as stack:
        try:
            files = await _receive(request, state, boundary, stack)
        finally:
            await asyncio.to_thread(database.cancel_upload, ticket)
        locations = {}
        for field, file in files.items():
            if not file.size:
                continue  # nothing is selected
            ticket = await asyncio.to_thread(database.reserve_upload, token.id, file.size, seconds, quota)
            await asyncio.to_thread(file.commit)
            expires = database.clock() + settings.upload_ttl_hours * 3600
            await asyncio.to_thread(database.add_upload, ticket, file.digest, file.size, expires)
            metrics.log_event("uploaded", token=token.id, sha256=file.digest, size=file.size)
            locations[field] = f"sha256:{file.digest}"
    if not locations:
        raise Problem("bad-claim", "No file is selected. Select a model, a claim file, or both.")
    return locations


async def _receive(
    request: Request, state: AppState, boundary: bytes, stack: ExitStack
) -> dict[str, PendingFile]:
    """Write the files of a form; `stack` deletes those that are not committed."""
    files: dict[str, PendingFile] = {}
    complete: set[str] = set()
    async for field, piece in file_pieces(request.stream(), boundary):
        if field not in FIELDS or field in complete:
            detail = "The form has an unknown or a repeated field. Reload the page."
            raise Problem("malformed-request", detail)
        if field not in files:
            files[field] = stack.enter_context(state.uploads.pending_file())
        if piece is None:
            complete.add(field)
        else:
            await asyncio.to_thread(files[field].write, piece)
    return files
