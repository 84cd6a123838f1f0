"""Takes requests in, keeps them, has every claim answered, and tells what became of them.

A request that was accepted is answered, whoever dies meanwhile: claims are tried again by the service, first
together with those on the same model, then alone, so that a claim that kills verifiers takes none along.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtlsign.errors import KeyMaterialError
from mtlsign.service import metrics
from mtlsign.service.files import Shelf
from mtlsign.service.metrics import Metrics
from mtlsign.service.pointers import MAX_POINTER
from mtlsign.service.problems import Problem
from mtlsign.service.signing import Keys
from mtlsign.service.store import Job, Store
from mtlsign.service.tokens import Token
from mtlsign.service.verifier import Answer, Backend, Lost, Outcome, Question, Task
from mtlsign.settings_service import ServiceSettings

TASK_CLAIMS = 16
LEASE_S = 15.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Asked:
    """One claim of a request: its place, and the task's parts or the problem that it is."""

    at: int
    model: str = ""
    sha256: str | None = None
    question: Question | None = None
    problem: Problem | None = None


def read_claim(at: int, claim: object) -> Asked:
    """A claim as it was sent; whatever is wrong with it is its own problem."""
    try:
        if not isinstance(claim, dict) or not {"model", "bundle"} <= claim.keys() <= {
            "model",
            "bundle",
            "sha256",
        }:
            raise Problem("bad-claim", "a claim has the fields model, bundle and, if you like, sha256")
        model, bundle, digest = claim["model"], claim["bundle"], claim.get("sha256")
        if not isinstance(model, str) or not 1 <= len(model) <= MAX_POINTER:
            raise Problem("bad-claim", f"model must be a pointer of at most {MAX_POINTER} characters")
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise Problem("bad-claim", "sha256 must be 64 lower-case hexadecimal digits")
        if isinstance(bundle, str):
            return Asked(at, model, digest, Question(pointer=bundle))
        if not isinstance(bundle, dict):
            raise Problem("bad-claim", "bundle must be an opened claim (an object) or a pointer to one")
        return Asked(at, model, digest, Question(json.dumps(bundle).encode()))
    except Problem as problem:
        return Asked(at, problem=problem)


class Desk:
    """One process's desk. `start` before use, `stop` at the end."""

    def __init__(
        self, s: ServiceSettings, store: Store, keys: Keys, backend: Backend, figures: Metrics, *,
        parallel: int = 0,
    ) -> None:  # fmt: skip
        self.s, self.store, self.keys, self.backend, self.metrics = s, store, keys, backend, figures
        self.name = secrets.token_hex(8)
        self._uploads = Shelf(s.state / "uploads")
        self._room = asyncio.Semaphore(parallel or 2 * max(s.verifiers, s.max_verifiers))
        self._running: dict[str, asyncio.Task[None]] = {}
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
                await asyncio.to_thread(self.store.renew, self.name, LEASE_S)
                for job in await asyncio.to_thread(self.store.adopt, self.name, LEASE_S, list(self._running)):
                    metrics.event("adopted", job=job.id)
                    self._begin(job)
                if time.monotonic() - self._cleaned > 60 or not self._cleaned:
                    self._cleaned = time.monotonic()
                    for digest in await asyncio.to_thread(self.store.clean, self.s.keep_days * 86_400):
                        self._uploads.remove(digest)
                self.metrics.add("mtlsign_waiting", await asyncio.to_thread(self.store.waiting))
            await asyncio.sleep(LEASE_S / 3)

    async def submit(self, token: Token, claims: Sequence[object], idem: str | None) -> Job:
        """Keep a request and begin with it; the same idempotency key again: the request that is there.

        Raises: Problem malformed-request, conflicting-key, too-many-claims, busy.
        """
        if not 1 <= len(claims) <= self.s.max_claims:
            raise Problem("malformed-request", f"claims must be 1 to {self.s.max_claims}, not {len(claims)}")
        text = await asyncio.to_thread(lambda: json.dumps(list(claims)).encode())
        digest = hashlib.sha256(text).digest()
        if idem is None or not await asyncio.to_thread(self._known, token.id, idem):
            await asyncio.to_thread(self._check_room, token, len(claims))
        sealed = await asyncio.to_thread(self.keys.seal, text)
        now = self.store.clock()
        job = Job(secrets.token_hex(16), token.id, now, None, len(claims), sealed, digest)
        kept = await asyncio.to_thread(self.store.add, job, idem, self.name, now + LEASE_S)
        if kept.id == job.id:
            self.metrics.add("mtlsign_claims", len(claims))
            metrics.event("accepted", job=job.id, token=token.id, claims=len(claims))
            self._begin(job)
        return kept

    def _known(self, token: str, idem: str) -> bool:
        return bool(self.store.rows("SELECT 1 FROM jobs WHERE token=? AND idem=?", token, idem))

    def _check_room(self, token: Token, count: int) -> None:
        if self.store.waiting() + count > self.s.queue_claims:
            raise Problem("busy", f"{self.s.queue_claims} claims are waiting; try again later", retry_after=5)
        if self.store.waiting(token.id) + count > self.s.token_claims:
            detail = f"this token has {self.s.token_claims} claims waiting; wait for answers first"
            raise Problem("too-many-claims", detail, retry_after=5)

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
        start = time.perf_counter()
        try:
            claims = json.loads(await asyncio.to_thread(self.keys.unseal, job.sealed or b""))
        except KeyMaterialError as error:
            metrics.event("unreadable", job=job.id, reason=str(error))
            gone = Problem("internal", "the service lost the key that seals requests; send this one again")
            claims = [None] * job.count
            asked = [Asked(at, problem=gone) for at in range(job.count)]
        else:
            asked = [read_claim(at, claim) for at, claim in enumerate(claims)]
        done = await asyncio.to_thread(self.store.outcomes, job.id)
        groups: dict[tuple[str, str | None], list[Asked]] = {}
        refused = []
        for one in (one for one in asked if one.at not in done):
            problem = one.problem or await asyncio.to_thread(self._not_theirs, job.token, one)
            if problem is not None:
                refused.append((one.at, {"problem": problem.document()}))
            else:
                groups.setdefault((one.model, one.sha256), []).append(one)
        if refused:
            await self._keep(job, refused)
        parts = [g[i : i + TASK_CLAIMS] for g in groups.values() for i in range(0, len(g), TASK_CLAIMS)]
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(self._part(job, part))
        await asyncio.to_thread(self.store.finish, job.id)
        self.metrics.add("mtlsign_request_seconds", time.perf_counter() - start)
        metrics.event("answered", job=job.id, token=job.token, claims=job.count)

    def _not_theirs(self, token: str, one: Asked) -> Problem | None:
        for pointer in (one.model, one.question.pointer if one.question else None):
            if pointer and pointer.startswith("sha256:") and not self.store.upload(token, pointer[7:]):
                return Problem(
                    "not-found", "this token has no upload of that digest (any more); send it first"
                )
        return None

    async def _part(self, job: Job, part: Sequence[Asked]) -> None:
        async with self._room:
            outcomes = await self._answer(part, self.s.attempts)
        await self._keep(job, [(one.at, outcome) for one, outcome in zip(part, outcomes, strict=True)])

    async def _answer(self, part: Sequence[Asked], attempts: int) -> list[Outcome]:
        task = Task(part[0].model, part[0].sha256, tuple(one.question or Question() for one in part))
        limit = self.s.fetch_s + self.s.claim_s * (len(part) + 1)
        try:
            answer = await self._ask(task, limit)
        except Problem as problem:
            return [{"problem": problem.document()} for _ in part]
        except (Lost, TimeoutError) as error:
            self.metrics.add("mtlsign_retries", len(part))
            metrics.event("lost", claims=len(part), left=attempts - 1, reason=type(error).__name__)
            if attempts <= 1:
                kind = "too-long" if isinstance(error, TimeoutError) else "verifier-lost"
                gone = Problem(
                    kind, "no verifier lived to answer this claim; try it alone, later", retry_after=30
                )
                return [{"problem": gone.document()} for _ in part]
            if len(part) == 1:
                return await self._answer(part, attempts - 1)
            return [(await self._answer([one], attempts - 1))[0] for one in part]
        for stage, seconds in answer.seconds.items():
            self.metrics.add("mtlsign_stage_seconds", seconds, stage)
        self.metrics.add("mtlsign_cache", 1, "hit" if answer.cached else "miss")
        if len(answer.outcomes) != len(part):
            raise RuntimeError("a verifier answered another number of claims than it was asked")
        return answer.outcomes

    async def _ask(self, task: Task, limit: float) -> Answer:
        """Ask until somebody has room; busy verifiers are no reason to fail what was accepted."""
        pause = 0.1
        while True:
            try:
                return await asyncio.wait_for(self.backend.verify(task), limit)
            except Problem as problem:
                if problem.kind != "busy":
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _keep(self, job: Job, found: Sequence[tuple[int, Outcome]]) -> None:
        rows = []
        for at, outcome in found:
            verdict, envelope = outcome.get("verdict"), None
            if verdict is not None:
                envelope = self.keys.sign(outcome, f"{job.id}.{at}", int(self.store.clock()))
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
