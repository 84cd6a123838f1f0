"""Verification of a group of claims on one model: backend calls, retries after crashes, signed outcomes."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import KeyMaterialError
from mtlsign.service import metrics
from mtlsign.service.auth.signing import ServiceKeys
from mtlsign.service.database import Database, Job
from mtlsign.service.metrics import Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.queue.claim_request import ClaimRequest, parse_claim_request
from mtlsign.service.queue.crash_attribution import CrashAttribution
from mtlsign.service.queue.fair_semaphore import FairSemaphore
from mtlsign.service.verifier.verifier import (
    GRACE_S,
    ClaimOutcome,
    VerificationBatchResult,
    VerificationTask,
    VerifierBackend,
    VerifierCrashed,
)

#: Seconds before the first retry; doubled after each crash, at most 10.
PAUSE_S = 0.1
SERVICE_FAILED = "The service failed on this claim and logged the failure. Report it to the operator."


class BackendError(VerifierCrashed):
    """A backend call failed with an unexpected exception."""


def internal_problem(event: str, error: Exception) -> ClaimOutcome:
    """Log an unexpected error under `event` and return the outcome of the affected claim."""
    metrics.log_exception(event, error)
    return {"problem": Problem("internal", SERVICE_FAILED).document()}


class GroupVerifier:
    """Verifier of claim groups that saves each outcome in the database as soon as it is known.

    Args:
        settings: limits and number of attempts.
        database: stored requests and results.
        keys: keys that decrypt claims and sign verdicts.
        backend: verifiers.
        recorder: destination of the metrics.
        parallel: number of groups verified at the same time.
    """

    def __init__(
        self, settings: ServiceSettings, database: Database, keys: ServiceKeys, backend: VerifierBackend,
        recorder: Metrics, *, parallel: int,
    ) -> None:  # fmt: skip
        self.settings, self.database, self.keys = settings, database, keys
        self.backend, self.metrics = backend, recorder
        self._semaphore = FairSemaphore(parallel)

    def decrypt_claim(self, job: Job, index: int) -> ClaimRequest:
        """Decrypt and parse one claim of a request."""
        try:
            text = self.keys.decrypt(self.database.encrypted_claim(job.id, index))
            return parse_claim_request(index, json.loads(text))
        except KeyMaterialError as error:
            metrics.log_event("claim_not_decrypted", job=job.id, reason=str(error))
            detail = "The service lost the key that encrypts requests. Send this request again."
            return ClaimRequest(index, problem=Problem("internal", detail))

    async def verify_group(self, job: Job, model: str, digest: str | None, claims: Sequence[int]) -> None:
        """Verify claims on one model and save their outcomes; retry after crashes of the verifier.

        Outcomes reported before a crash are kept. The claim at which the verifier crashed is retried alone.

        Args:
            job: the request.
            model: location of the model.
            digest: SHA-256 that the model must have, hex, or None.
            claims: indices of the claims in the request.
        """
        attribution = CrashAttribution(self.settings.max_attempts)
        groups = deque([list(claims)])
        while groups:
            group = groups.popleft()
            async with self._semaphore.acquire(job.token):
                if await asyncio.to_thread(self.database.is_closed, job.id):  # its token was revoked
                    return
                isolate = attribution.crashes > 0
                outcomes, crash = await self._call_backend(job, model, digest, group, isolate=isolate)
            await self.save_outcomes(job, list(zip(group, outcomes, strict=False)))
            remaining = group[len(outcomes) :]
            if crash is None or not remaining:
                continue
            plan = attribution.record(remaining, crash)
            self.metrics.add("mtlsign_retries", len(remaining))
            metrics.log_event(
                "verifier_crashed", claims=len(remaining), crashes=attribution.crashes,
                reason=type(crash).__name__,
            )  # fmt: skip
            problem = Problem("verifier-lost", "Every verifier crashed on this claim. Send it alone later.")
            if isinstance(crash, BackendError):
                problem = Problem("internal", SERVICE_FAILED)
            await self.save_outcomes(job, [(i, {"problem": problem.document()}) for i in plan.exhausted])
            groups.extend(plan.groups)
            if groups:
                await asyncio.sleep(min(PAUSE_S * 2**attribution.crashes, 10.0))

    async def _call_backend(
        self, job: Job, model: str, digest: str | None, group: Sequence[int], *, isolate: bool
    ) -> tuple[list[ClaimOutcome], VerifierCrashed | None]:
        """Return outcomes of the first claims of `group`, and the crash if some are missing."""
        requests = [await asyncio.to_thread(self.decrypt_claim, job, index) for index in group]
        task = VerificationTask(model, digest, tuple(request.opened for request in requests), isolate)
        located = sum(request.opened.location is not None for request in requests)
        limit = self.settings.fetch_timeout_s * (1 + located)
        limit += (self.settings.claim_timeout_s + GRACE_S) * (len(requests) + 1)
        pause = 0.1
        while True:
            try:
                result = await asyncio.wait_for(self.backend.verify(task), 2 * limit)
                if len(result.outcomes) != len(group):
                    raise RuntimeError("The verifier returned another number of outcomes than claims.")
                break
            except Problem as problem:
                if problem.kind != "busy":  # an accepted claim waits for busy verifiers
                    return [{"problem": problem.document()} for _ in group], None
            except VerifierCrashed as crash:
                return crash.outcomes, crash
            except TimeoutError:
                return [], VerifierCrashed(claim_started=None)
            except Exception as error:
                metrics.log_exception("backend_error", error)
                return [], BackendError(claim_started=None)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        self._record(job, len(group), result)
        return result.outcomes, None

    def _record(self, job: Job, count: int, result: VerificationBatchResult) -> None:
        """Record the time of each stage in the log and the metrics."""
        rounded = {stage: round(seconds, 5) for stage, seconds in result.seconds.items()}
        metrics.log_event(
            "verification_task", job=job.id, claims=count, cached=result.cached, seconds=rounded
        )
        for stage, seconds in result.seconds.items():
            self.metrics.add("mtlsign_stage_seconds", seconds, stage)
        self.metrics.add("mtlsign_cache", 1, "hit" if result.cached else "miss")

    async def save_outcomes(self, job: Job, outcomes: Sequence[tuple[int, ClaimOutcome]]) -> None:
        """Sign verdicts and save outcomes, each given with the index of its claim."""
        rows = []
        if not outcomes:
            return
        for index, outcome in outcomes:
            verdict, envelope = outcome.get("verdict"), None
            if verdict is not None:
                try:
                    envelope = self.keys.sign(outcome, f"{job.id}.{index}", int(self.database.clock()))
                except Exception as error:
                    outcome, verdict = internal_problem("signing_failed", error), None
            if verdict is not None:
                self.metrics.add("mtlsign_answers", 1, verdict["status"])
            else:
                self.metrics.add("mtlsign_answers", 1, "problem")
                self.metrics.add("mtlsign_refusals", 1, outcome["problem"]["type"].rpartition(":")[2])
            rows.append((index, outcome, envelope))
        await asyncio.to_thread(self.database.save_results, job.id, rows)
