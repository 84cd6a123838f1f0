"""Takes requests in, keeps them, has every claim answered, and tells what became of them.

A request that was accepted is answered, whoever dies meanwhile: claims are tried again by the service, and
the one at which a verifier died alone, so that it takes no other along. Tokens take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import sqlite3
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from typing import Any

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import KeyMaterialError
from mtlsign.service import metrics
from mtlsign.service.auth.signing import Keys
from mtlsign.service.auth.tokens import Token
from mtlsign.service.database import Database, Job, QueueLimits
from mtlsign.service.fetch.model_cache import ContentStore
from mtlsign.service.metrics import Metrics
from mtlsign.service.problems import Problem
from mtlsign.service.queue.claim_request import ClaimRequest, parse_claim_request
from mtlsign.service.queue.fair_semaphore import FairSemaphore
from mtlsign.service.verifier.verifier import (
    GRACE_S,
    ClaimOutcome,
    VerificationTask,
    VerifierBackend,
    VerifierCrashed,
)

TASK_CLAIMS = 16
LEASE_S = 15.0
PAUSE_S = 0.1


class BackendError(VerifierCrashed):
    """Asking went wrong in a way that nobody thought of."""


def _of_the_machine(error: BaseException) -> bool:
    """Whether a full disk or the like is at fault: trying again later is right, however often."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_of_the_machine, error.exceptions))
    return isinstance(error, OSError | sqlite3.OperationalError | MemoryError)


def _defect(name: str, error: Exception) -> ClaimOutcome:
    metrics.log_exception(name, error)
    detail = "the service failed at this claim; the failure was logged"
    return {"problem": Problem("internal", detail).document()}


class JobQueue:
    """One process's desk. `start` before use, `stop` at the end."""

    def __init__(
        self, settings: ServiceSettings, store: Database, keys: Keys, backend: VerifierBackend, figures: Metrics, *,
        parallel: int = 0,
    ) -> None:  # fmt: skip
        self.settings, self.store, self.keys, self.backend, self.metrics = (
            settings,
            store,
            keys,
            backend,
            figures,
        )
        self.name = secrets.token_hex(8)
        self._uploads = ContentStore(settings.state / "uploads")
        self._turns = FairSemaphore(parallel or 2 * max(settings.verifiers, settings.max_verifiers))
        self._room = QueueLimits(
            settings.token_claims, settings.token_mb * MIB, settings.queue_claims, settings.queue_mb * MIB
        )
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failures: Counter[str] = Counter()
        self._keeper: asyncio.Task[None] | None = None
        self._cleaned = 0.0

    async def start(self) -> None:
        """Take up what a former process left."""
        self._keeper = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        """Put everything down; requests under way are left to the next process."""
        for task in filter(None, (self._keeper, *self._running.values())):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _keep_up(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self.store.renew, list(self._running), LEASE_S)
                for job in await asyncio.to_thread(self.store.adopt, self.name, LEASE_S, list(self._running)):
                    metrics.log_event("adopted", job=job.id)
                    self._begin(job)
                if time.monotonic() - self._cleaned > 60 or not self._cleaned:
                    self._cleaned = time.monotonic()
                    wanted = await asyncio.to_thread(self.store.clean, self.settings.keep_days * 86_400)
                    await asyncio.to_thread(self._uploads.sweep, wanted)
                self.metrics.add("mtlsign_waiting", await asyncio.to_thread(self.store.waiting))
            await asyncio.sleep(LEASE_S / 3)

    async def submit(self, token: Token, claims: Sequence[object], idem: str | None) -> Job:
        """Keep a request and begin with it; the same idempotency key again: the request that is there.

        Raises: Problem malformed-request, conflicting-key, too-many-claims, busy.
        """
        if not 1 <= len(claims) <= self.settings.max_claims:
            raise Problem(
                "malformed-request", f"claims must be 1 to {self.settings.max_claims}, not {len(claims)}"
            )
        if await asyncio.to_thread(self.store.known, token.id, idem) is None:  # before the work of sealing
            await asyncio.to_thread(self.store.check_room, token.id, len(claims), 0, self._room)
        sealed, digest = await asyncio.to_thread(self._seal, claims)
        now = self.store.clock()
        job = Job(secrets.token_hex(16), token.id, now, None, len(claims), digest)
        kept = await asyncio.to_thread(
            self.store.add, job, sealed, idem, self.name, now + LEASE_S, self._room
        )
        if kept.id == job.id:
            self.metrics.add("mtlsign_claims", len(claims))
            metrics.log_event("accepted", job=job.id, token=token.id, claims=len(claims))
            self._begin(job)
        return kept

    def _seal(self, claims: Sequence[object]) -> tuple[list[bytes], bytes]:
        """Each claim encrypted by itself, so that one at a time is opened, and a digest of all."""
        sealed, digest = [], hashlib.sha256()
        for claim in claims:
            text = json.dumps(claim).encode()
            digest.update(len(text).to_bytes(8, "big") + text)
            sealed.append(self.keys.seal(text))
        return sealed, digest.digest()

    def _begin(self, job: Job) -> None:
        task = asyncio.create_task(self._run(job))
        self._running[job.id] = task
        task.add_done_callback(lambda _: self._running.pop(job.id, None))

    async def wait(self, job: Job, seconds: float) -> Job:
        """The request once it is answered, or as it is after so many seconds."""
        end = time.monotonic() + seconds
        while job.finished is None:
            left = end - time.monotonic()
            if left <= 0:
                break
            task = self._running.get(job.id)
            if task is not None:
                await asyncio.wait({task}, timeout=left)
            else:
                await asyncio.sleep(min(left, 0.2))  # another process has it
            job = await asyncio.to_thread(self.store.job, job.id, job.token)
        return job

    async def _run(self, job: Job) -> None:
        try:
            await self._work(job)
        except Exception as error:  # a full disk, say: taken up again when the lease has run out
            metrics.log_exception("put_down", error)
            self._failures[job.id] += not _of_the_machine(error)
            try:
                await self._put_down(job, error)
            except Exception as again:  # that could not be kept either: the lease still runs out
                metrics.log_exception("put_down", again)
        else:
            self._failures.pop(job.id, None)

    async def _put_down(self, job: Job, error: Exception) -> None:
        """Leave a request for later; after too many failures answer what is open and end it."""
        if self._failures[job.id] < self.settings.attempts:
            await asyncio.to_thread(self.store.put_down, job.id, self.store.clock() + LEASE_S)
            return
        done = await asyncio.to_thread(self.store.outcomes, job.id)
        await self._keep(job, [(at, _defect("gave_up", error)) for at in range(job.count) if at not in done])
        await asyncio.to_thread(self.store.finish, job.id)
        self._failures.pop(job.id, None)

    async def _work(self, job: Job) -> None:
        start = time.perf_counter()
        refused, groups = await asyncio.to_thread(self._sort, job)
        if refused:
            await self._keep(job, refused)
        async with asyncio.TaskGroup() as group:
            for (model, digest), places in groups.items():
                for i in range(0, len(places), TASK_CLAIMS):
                    group.create_task(self._part(job, model, digest, places[i : i + TASK_CLAIMS]))
        await asyncio.to_thread(self.store.finish, job.id)
        self.metrics.add("mtlsign_request_seconds", time.perf_counter() - start)
        metrics.log_event("answered", job=job.id, token=job.token, claims=job.count)

    def _sort(
        self, job: Job
    ) -> tuple[list[tuple[int, ClaimOutcome]], dict[tuple[str, str | None], list[int]]]:
        """What can be refused now, and the places of the other claims by model. Holds one claim at a time."""
        done = self.store.outcomes(job.id)
        refused: list[tuple[int, ClaimOutcome]] = []
        groups: dict[tuple[str, str | None], list[int]] = {}
        for at in range(job.count):
            if at in done:
                continue
            try:
                one = self._open(job, at)
                problem = one.problem or self._not_theirs(job.token, one)
            except Exception as error:
                if _of_the_machine(error):
                    raise
                refused.append((at, _defect("claim_unread", error)))
                continue
            if problem is not None:
                refused.append((at, {"problem": problem.document()}))
            else:
                groups.setdefault((one.model, one.sha256), []).append(at)
        return refused, groups

    def _open(self, job: Job, at: int) -> ClaimRequest:
        """One claim, decrypted."""
        try:
            return parse_claim_request(at, json.loads(self.keys.unseal(self.store.sealed(job.id, at))))
        except KeyMaterialError as error:
            metrics.log_event("unreadable", job=job.id, reason=str(error))
            detail = "the service lost the key that seals requests; send this one again"
            return ClaimRequest(at, problem=Problem("internal", detail))

    def _not_theirs(self, token: str, one: ClaimRequest) -> Problem | None:
        for pointer in (one.model, one.question.pointer):
            if pointer and pointer.startswith("sha256:") and not self.store.upload(token, pointer[7:]):
                detail = "this token has no upload of that digest (any more); send it first"
                return Problem("not-found", detail)
        return None

    async def _part(self, job: Job, model: str, digest: str | None, places: Sequence[int]) -> None:
        """Answer claims on one model. When their verifier dies they are asked again, carefully: what the next
        one tells until it dies too is kept, the claim at which it died is tried alone, the others as before.
        """
        groups = deque([list(places)])
        strikes: defaultdict[int, float] = defaultdict(float)
        losses = 0
        while groups:
            asked = groups.popleft()
            async with self._turns.of(job.token):
                if await asyncio.to_thread(self.store.ended, job.id):  # its token was revoked
                    return
                told, error = await self._ask(job, model, digest, asked, careful=losses > 0)
            await self._keep(job, list(zip(asked, told, strict=False)))
            rest = asked[len(told) :]
            if error is None or not rest:
                continue
            losses += 1
            self.metrics.add("mtlsign_retries", len(rest))
            metrics.log_event("lost", claims=len(rest), times=losses, reason=type(error).__name__)
            # Whose turn it was is the suspect; where nobody can tell, all are, half as much; at first, none.
            guilty = rest[:1] if error.begun else rest if losses > 1 else []
            for at in guilty:
                strikes[at] += 1 if error.begun else 0.5
            most = self.settings.attempts
            enough = [at for at in rest if strikes[at] >= most or losses >= 10 * most]
            gone = Problem("verifier-lost", "no verifier lived to answer this claim; try it alone, later")
            if isinstance(error, BackendError):
                gone = Problem("internal", "the service failed at this claim; the failure was logged")
            await self._keep(job, [(at, {"problem": gone.document()}) for at in enough])
            innocent = [at for at in rest if at not in guilty and at not in enough]
            groups.extend([innocent] if innocent else [])
            groups.extend([at] for at in guilty if at not in enough)
            if groups:
                await asyncio.sleep(min(PAUSE_S * 2**losses, 10.0))

    async def _ask(
        self, job: Job, model: str, digest: str | None, places: Sequence[int], *, careful: bool
    ) -> tuple[list[ClaimOutcome], VerifierCrashed | None]:
        """Outcomes from the first place on, and how the verifier was lost if they are not all there."""
        asked = [await asyncio.to_thread(self._open, job, at) for at in places]
        task = VerificationTask(model, digest, tuple(one.question for one in asked), careful)
        limit = self.settings.fetch_s * (1 + sum(one.question.pointer is not None for one in asked))
        limit += (self.settings.claim_s + GRACE_S) * (len(asked) + 1)
        pause = 0.1
        while True:
            try:
                answer = await asyncio.wait_for(self.backend.verify(task), 2 * limit)
                if len(answer.outcomes) != len(places):
                    raise RuntimeError("a verifier answered another number of claims than it was asked")
                break
            except Problem as problem:
                if problem.kind != "busy":  # busy verifiers are no reason to fail what was accepted
                    return [{"problem": problem.document()} for _ in places], None
            except VerifierCrashed as lost:
                return lost.outcomes, lost
            except TimeoutError:
                return [], VerifierCrashed(begun=None)
            except Exception as error:
                metrics.log_exception("asked_in_vain", error)
                return [], BackendError(begun=None)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        rounded = {stage: round(seconds, 5) for stage, seconds in answer.seconds.items()}
        metrics.log_event("asked", job=job.id, claims=len(places), cached=answer.cached, seconds=rounded)
        for stage, seconds in answer.seconds.items():
            self.metrics.add("mtlsign_stage_seconds", seconds, stage)
        self.metrics.add("mtlsign_cache", 1, "hit" if answer.cached else "miss")
        return answer.outcomes, None

    async def _keep(self, job: Job, found: Sequence[tuple[int, ClaimOutcome]]) -> None:
        rows = []
        if not found:
            return
        for at, outcome in found:
            verdict, envelope = outcome.get("verdict"), None
            if verdict is not None:
                try:
                    envelope = self.keys.sign(outcome, f"{job.id}.{at}", int(self.store.clock()))
                except Exception as error:
                    outcome, verdict = _defect("unsigned", error), None
            if verdict is not None:
                self.metrics.add("mtlsign_answers", 1, verdict["status"])
            else:
                self.metrics.add("mtlsign_answers", 1, "problem")
                self.metrics.add("mtlsign_refusals", 1, outcome["problem"]["type"].rpartition(":")[2])
            rows.append((at, outcome, envelope))
        await asyncio.to_thread(self.store.keep, job.id, rows)

    async def answer(self, job: Job) -> dict[str, Any]:
        """The document of a request: id, state, and results in the order of the claims (null: not yet)."""
        found = await asyncio.to_thread(self.store.outcomes, job.id)
        results = []
        for at in range(job.count):
            outcome = found.get(at)
            if outcome is not None and "verdict" in outcome:
                outcome = {"verdict": outcome["verdict"], "id": f"{job.id}.{at}", "key": outcome["key"]}
            results.append(outcome)
        state = "done" if job.finished is not None else "running"
        return {"id": job.id, "state": state, "created": job.created, "results": results}
