"""Bulk work: many claims, answered by a desk of their own in this process, in order, each verdict signed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import ClusterError
from mtlsign.service.auth import tokens
from mtlsign.service.auth.tokens import Token
from mtlsign.service.problems import Problem
from mtlsign.service.state import AppState
from mtlsign.service.verifier.verifier import VerifierBackend


def _chunks(settings: ServiceSettings, claims: Sequence[Any]) -> Iterator[list[Any]]:
    """As many claims at a time as the service's room takes: so many, and half of the bytes that may wait."""
    most = min(settings.max_claims, settings.token_claims, settings.queue_claims)
    room = min(settings.token_mb, settings.queue_mb) * MIB // 2
    chunk: list[Any] = []
    size = 0
    for claim in claims:
        weight = len(json.dumps(claim)) + 256
        if chunk and (len(chunk) >= most or size + weight > room):
            yield chunk
            chunk, size = [], 0
        chunk.append(claim)
        size += weight
    if chunk:
        yield chunk


async def verify_batch(
    settings: ServiceSettings,
    backend: VerifierBackend,
    claims: Sequence[Any],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Have claims answered by a desk of their own; `keep` gets the results in order, as they come.

    Raises: ClusterError, KeyMaterialError, whatever `keep` raises.
    """
    office = AppState.open(settings, backend)
    token = tokens.check(office.store, tokens.issue(office.store, "batch", ["verify"], 24 * 365))
    await office.desk.start()
    try:
        for chunk in _chunks(settings, claims):
            keep(await _answered(office, token, chunk))
    except (Problem, sqlite3.OperationalError) as error:
        text = error.detail if isinstance(error, Problem) else f"{settings.state}: {error}"
        raise ClusterError(f"{text}; what was answered is kept", field="batch") from None
    finally:
        await office.desk.stop()
        with suppress(sqlite3.OperationalError):
            tokens.revoke(office.store, token.id)
        office.store.close()


async def _answered(office: AppState, token: Token, claims: list[Any]) -> list[dict[str, Any]]:
    while True:
        try:
            job = await office.desk.submit(token, claims, None)
            break
        except Problem as problem:
            if problem.kind == "too-many-claims" and len(claims) == 1:  # nothing else of ours is waiting
                detail = "the claim is larger than may wait; raise token_mb"
                return [{"problem": Problem("too-large", detail).document()}]
            if problem.kind != "busy":
                raise
            await asyncio.sleep(problem.retry_after or 1.0)  # a service on the same state has its own claims
    document = await office.desk.answer(await office.desk.wait(job, float("inf")))
    found: list[dict[str, Any]] = document["results"]
    for result in found:
        if "id" in result:
            name, _, place = result["id"].partition(".")
            result["envelope"] = (office.store.envelope(name, int(place)) or b"").decode()
    return found
