"""Durable queue of verification requests: submission, leases, scheduling and results.

An accepted request is answered even if processes crash: its claims are stored until each has an outcome, and
a request whose lease has expired is acquired by another process. Tokens take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.service import metrics
from mtlsign.service.auth.signing import ServiceKeys
from mtlsign.service.auth.tokens import Token
from mtlsign.service.database import Database, Job, QueueLimits
from mtlsign.service.fetch.content_store import ContentStore
from mtlsign.service.metrics import Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.queue.claim_request import ClaimRequest
from mtlsign.service.queue.group_verifier import GroupVerifier, internal_problem
from mtlsign.service.verifier.verifier import ClaimOutcome, VerifierBackend

#: Claims in one verification task.
TASK_CLAIMS = 16
LEASE_S = 15.0
CLEANUP_S = 60.0


def _is_environment_error(error: BaseException) -> bool:
    """Return whether the machine is the cause, for example a full disk. Such errors are always retried."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_environment_error, error.exceptions))
    return isinstance(error, OSError | sqlite3.OperationalError | MemoryError)


class JobQueue:
    """Queue of one process. Call `start` before use and `stop` at the end."""

    def __init__(
        self, settings: ServiceSettings, database: Database, keys: ServiceKeys, backend: VerifierBackend,
        recorder: Metrics, *, parallel: int = 0,
    ) -> None:  # fmt: skip
        self.settings, self.database, self.keys, self.metrics = settings, database, keys, recorder
        self.name = secrets.token_hex(8)
        self._uploads = ContentStore(settings.state_dir / "uploads")
        parallel = parallel or 2 * max(settings.min_replicas, settings.max_replicas)
        self._verifier = GroupVerifier(settings, database, keys, backend, recorder, parallel=parallel)
        self._limits = QueueLimits(
            settings.max_queued_claims_per_token, settings.max_queued_mb_per_token * MIB,
            settings.max_queued_claims, settings.max_queued_mb * MIB,
        )  # fmt: skip
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failures: Counter[str] = Counter()
        self._housekeeper: asyncio.Task[None] | None = None
        self._cleaned_at = 0.0

    async def start(self) -> None:
        """Start housekeeping, which also acquires the requests of a former process."""
        self._housekeeper = asyncio.create_task(self._housekeeping())

    async def stop(self) -> None:
        """Cancel all work; the next process acquires the unfinished requests."""
        for task in filter(None, (self._housekeeper, *self._running.values())):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _housekeeping(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                await self._renew_and_acquire()
                if time.monotonic() - self._cleaned_at > CLEANUP_S or not self._cleaned_at:
                    self._cleaned_at = time.monotonic()
                    retention_s = self.settings.retention_days * 86_400
                    stored_claims = self.settings.max_stored_claims_per_token
                    referenced = await asyncio.to_thread(
                        self.database.delete_expired, retention_s, stored_claims
                    )
                    await asyncio.to_thread(self._uploads.delete_unreferenced, referenced)
                waiting = await asyncio.to_thread(self.database.waiting_claims)
                self.metrics.add("mtlsign_waiting", waiting)
            await asyncio.sleep(LEASE_S / 3)

    async def _renew_and_acquire(self) -> None:
        """Renew the leases of running requests and acquire those whose lease has expired."""
        running = list(self._running)
        await asyncio.to_thread(self.database.renew_leases, running, LEASE_S)
        for job in await asyncio.to_thread(self.database.acquire_expired, self.name, LEASE_S, running):
            metrics.log_event("job_acquired", job=job.id)
            self._begin(job)

    async def submit(self, token: Token, claims: Sequence[object], idempotency_key: str | None) -> Job:
        """Store a request and start it, or return the stored request of the same idempotency key.

        Args:
            token: token of the client.
            claims: parsed JSON values, 1 to `settings.max_claims`.
            idempotency_key: key chosen by the client, or None.

        Raises:
            Problem: malformed-request, conflicting-key, too-many-claims or busy.
        """
        most = self.settings.max_claims
        if not 1 <= len(claims) <= most:
            raise Problem("malformed-request", f"A request has 1 to {most} claims, not {len(claims)}.")
        stored = await asyncio.to_thread(self.database.find_by_idempotency_key, token.id, idempotency_key)
        if stored is None:  # checked before the claims are encrypted, which takes time
            await asyncio.to_thread(self.database.check_limits, token.id, len(claims), 0, self._limits)
        encrypted, digest = await asyncio.to_thread(self._encrypt, claims)
        now = self.database.clock()
        job = Job(secrets.token_hex(16), token.id, now, None, len(claims), digest)
        stored = await asyncio.to_thread(
            self.database.add, job, encrypted, idempotency_key, self.name, now + LEASE_S, self._limits
        )
        if stored.id == job.id:
            self.metrics.add("mtlsign_claims", len(claims))
            metrics.log_event("job_accepted", job=job.id, token=token.id, claims=len(claims))
            self._begin(job)
        return stored

    def _encrypt(self, claims: Sequence[object]) -> tuple[list[bytes], bytes]:
        """Return each claim encrypted separately, to be decrypted one at a time, and a digest of all."""
        encrypted, digest = [], hashlib.sha256()
        for claim in claims:
            text = json.dumps(claim).encode()
            digest.update(len(text).to_bytes(8, "big") + text)
            encrypted.append(self.keys.encrypt(text))
        return encrypted, digest.digest()

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self._run_job(job))
        self._running[job.id] = task
        task.add_done_callback(lambda _: self._running.pop(job.id, None))

    async def wait(self, job: Job, seconds: float) -> Job:
        """Wait until the request is finished, at most `seconds`; return its current state."""
        end = time.monotonic() + seconds
        while job.finished is None:
            remaining = end - time.monotonic()
            if remaining <= 0:
                break
            task = self._running.get(job.id)
            if task is not None:
                await asyncio.wait({task}, timeout=remaining)
            else:
                await asyncio.sleep(min(remaining, 0.2))  # another process runs it
            job = await asyncio.to_thread(self.database.job, job.id, job.token)
        return job

    async def _run_job(self, job: Job) -> None:
        try:
            await self._process(job)
        except Exception as error:  # for example a full disk: retried after the lease has expired
            metrics.log_exception("job_released", error)
            self._failures[job.id] += not _is_environment_error(error)
            try:
                await self._release_for_retry(job, error)
            except Exception as release_error:  # the release was not written; the lease still expires
                metrics.log_exception("job_released", release_error)
        else:
            self._failures.pop(job.id, None)

    async def _release_for_retry(self, job: Job, error: Exception) -> None:
        """Release a request for a later retry, or close it with problems after `max_attempts` failures."""
        if self._failures[job.id] < self.settings.max_attempts:
            await asyncio.to_thread(self.database.release, job.id, self.database.clock() + LEASE_S)
            return
        results = await asyncio.to_thread(self.database.outcomes, job.id)
        unanswered = [index for index in range(job.count) if index not in results]
        outcomes = [(index, internal_problem("job_failed", error)) for index in unanswered]
        await self._verifier.save_outcomes(job, outcomes)
        await asyncio.to_thread(self.database.finish, job.id)
        self._failures.pop(job.id, None)

    async def _process(self, job: Job) -> None:
        start = time.perf_counter()
        refused, groups = await asyncio.to_thread(self._group_by_model, job)
        if refused:
            await self._verifier.save_outcomes(job, refused)
        async with asyncio.TaskGroup() as tasks:
            for (model, digest), claims in groups.items():
                for i in range(0, len(claims), TASK_CLAIMS):
                    part = claims[i : i + TASK_CLAIMS]
                    tasks.create_task(self._verifier.verify_group(job, model, digest, part))
        await asyncio.to_thread(self.database.finish, job.id)
        self.metrics.add("mtlsign_request_seconds", time.perf_counter() - start)
        metrics.log_event("job_finished", job=job.id, token=job.token, claims=job.count)

    def _group_by_model(
        self, job: Job
    ) -> tuple[list[tuple[int, ClaimOutcome]], dict[tuple[str, str | None], list[int]]]:
        """Return the claims that can be refused now, and the indices of the others by model.

        Only one decrypted claim is in memory at a time.
        """
        results = self.database.outcomes(job.id)
        refused: list[tuple[int, ClaimOutcome]] = []
        groups: dict[tuple[str, str | None], list[int]] = {}
        for index in range(job.count):
            if index in results:
                continue
            try:
                request = self._verifier.decrypt_claim(job, index)
                problem = request.problem or self._unauthorized_upload(job.token, request)
            except Exception as error:
                if _is_environment_error(error):
                    raise
                refused.append((index, internal_problem("claim_not_parsed", error)))
                continue
            if problem is not None:
                refused.append((index, {"problem": problem.document()}))
            else:
                groups.setdefault((request.model, request.sha256), []).append(index)
        return refused, groups

    def _unauthorized_upload(self, token: str, request: ClaimRequest) -> Problem | None:
        """Return the problem of a claim that names an upload of another token, or an expired one."""
        for location in (request.model, request.opened.location):
            if location and location.startswith("sha256:") and not self.database.upload(token, location[7:]):
                detail = "This token has no upload of that digest, or it has expired. Upload the file again."
                return Problem("not-found", detail)
        return None

    async def document(self, job: Job) -> dict[str, Any]:
        """Return id, state and results of a request; results are in claim order, null while missing."""
        outcomes = await asyncio.to_thread(self.database.outcomes, job.id)
        results = []
        for index in range(job.count):
            outcome = outcomes.get(index)
            if outcome is not None and "verdict" in outcome:
                outcome = {"verdict": outcome["verdict"], "id": f"{job.id}.{index}", "key": outcome["key"]}
            results.append(outcome)
        state = "done" if job.finished is not None else "running"
        return {"id": job.id, "state": state, "created": job.created, "results": results}
