"""Verification of many claims by a queue in this process, in order, with signed verdicts."""

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
    """Yield chunks that fit into the queue: its limit of claims, and half of its limit of bytes."""
    most = min(settings.max_claims, settings.max_queued_claims_per_token, settings.max_queued_claims)
    most_bytes = min(settings.max_queued_mb_per_token, settings.max_queued_mb) * MIB // 2
    chunk: list[Any] = []
    size = 0
    for claim in claims:
        claim_bytes = len(json.dumps(claim)) + 256
        if chunk and (len(chunk) >= most or size + claim_bytes > most_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(claim)
        size += claim_bytes
    if chunk:
        yield chunk


async def verify_batch(
    settings: ServiceSettings,
    backend: VerifierBackend,
    claims: Sequence[Any],
    on_results: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Verify claims with a queue in this process.

    Args:
        settings: settings of the queue and the verifiers.
        backend: verifiers.
        claims: parsed JSON values.
        on_results: called with the results of each chunk, in the order of the claims.

    Raises:
        ClusterError: the queue fails; earlier results were passed on.
        KeyMaterialError: an identity cannot be read.
    """
    state = AppState.open(settings, backend)
    database = state.database
    token = tokens.check(database, tokens.issue(database, "batch", ["verify"], 24 * 365))
    await state.queue.start()
    try:
        for chunk in _chunks(settings, claims):
            on_results(await _verify_chunk(state, token, chunk))
    except (Problem, sqlite3.OperationalError) as error:
        if isinstance(error, Problem):
            cause = error.detail
        else:
            cause = f"{settings.state_dir} cannot be written ({error}). Free space and try again."
        raise ClusterError(f"{cause} The results so far are kept.", field="batch") from None
    finally:
        await state.queue.stop()
        with suppress(sqlite3.OperationalError):
            tokens.revoke(database, token.id)
        database.close()


async def _verify_chunk(state: AppState, token: Token, claims: list[Any]) -> list[dict[str, Any]]:
    while True:
        try:
            job = await state.queue.submit(token, claims, None)
            break
        except Problem as problem:
            if problem.kind == "too-many-claims" and len(claims) == 1:  # it exceeds the limit alone
                detail = "The claim is larger than the queue accepts. Raise max_queued_mb_per_token."
                return [{"problem": Problem("too-large", detail).document()}]
            if problem.kind != "busy":
                raise
            # A service with the same state folder has filled the queue.
            await asyncio.sleep(problem.retry_after or 1.0)
    document = await state.queue.document(await state.queue.wait(job, float("inf")))
    results: list[dict[str, Any]] = document["results"]
    for result in results:
        if "id" in result:
            name, _, index = result["id"].partition(".")
            result["envelope"] = (state.database.envelope(name, int(index)) or b"").decode()
    return results
