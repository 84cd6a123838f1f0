"""Fake backends, networks and Ray handles of the service's tests."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from mtlsign.service.fetch.https import Response
from mtlsign.service.verifier.verifier import (
    InProcessVerifier,
    VerificationBatchResult,
    VerificationTask,
    VerifierCrashed,
)

REJECTED = {
    "status": "rejected", "matches": 1, "n": 128, "evidence_bits": 0.0, "bits_required": 120.0,
    "near_zero": 0, "statistic": "count", "reason": None, "model_digest": "00" * 32,
}  # fmt: skip


class SlowBackend:
    """Backend that answers once `go` is set. It crashes for the first `crashes` tasks and for `poison`."""

    def __init__(self, crashes: int = 0) -> None:
        self.go = asyncio.Event()
        self.tasks: list[VerificationTask] = []
        self.crashes = crashes
        self.poison: str | None = None

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        self.tasks.append(task)
        poison = (self.poison or "").encode()
        if self.crashes or (poison and any(poison in (claim.bundle or b"") for claim in task.claims)):
            self.crashes -= bool(self.crashes)
            raise VerifierCrashed
        await self.go.wait()
        outcome = {"verdict": REJECTED, "key": "00" * 32, "claim": None}
        return VerificationBatchResult([dict(outcome) for _ in task.claims])

    async def ready(self) -> bool:
        return self.go.is_set()


class CrashingBackend(SlowBackend):
    """Backend that crashes `times` times at the claim with `marker`; it reports progress if requested."""

    def __init__(self, marker: str, times: int) -> None:
        super().__init__()
        self.go.set()
        self.marker, self.times = marker.encode(), times

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        result = await super().verify(task)
        for i, claim in enumerate(task.claims):
            if self.times and self.marker in (claim.bundle or b""):
                self.times -= 1
                if task.isolate:
                    raise VerifierCrashed(result.outcomes[:i], claim_started=True)
                raise VerifierCrashed
        return result


class FaultyBackend(SlowBackend):
    """Backend that raises an unexpected exception for every task."""

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        self.tasks.append(task)
        raise KeyError("an unexpected exception")


class InstantBackend(SlowBackend):
    """Backend that answers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.go.set()


class BlockedBackend(InProcessVerifier):
    """Backend that verifies once `go` is set, so that a test can look at a running claim."""

    def __init__(self, verifier: Any) -> None:
        super().__init__(verifier)
        self.go = threading.Event()

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        await asyncio.to_thread(self.go.wait, 60)
        return await super().verify(task)


class FakeNetwork:
    """Simulated network: responses by path, addresses by host name, and the requests so far."""

    def __init__(
        self, responses: dict[str, Response], names: dict[str, list[list[str]]] | None = None
    ) -> None:
        self.responses, self.names = responses, names or {}
        self.requests: list[tuple[str, str, str]] = []

    def resolve(self, host: str, port: int) -> list[str]:
        answers = self.names.get(host, [["93.184.216.34"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def get(self, address: str, host: str, port: int, path: str, timeout: float) -> Response:
        self.requests.append((address, host, path))
        return self.responses[path]


def fake_response(body: bytes = b"x" * 10, status: int = 200, **headers: str) -> Response:
    """Return a response with a Content-Length; underscores in header names become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, {"content-length": str(len(body)), **named}, iter([body]))


class FakeServeHandle:
    """Handle on verifier replicas with the interface of Ray. `answer` is returned, raised or called."""

    def __init__(self) -> None:
        self.calls, self.alive, self.verify = 0, self, self
        self.answer: Any = True

    def options(self, **_: Any) -> FakeServeHandle:
        return self

    async def remote(self, *_: Any) -> Any:
        self.calls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return await self.answer() if callable(self.answer) else self.answer
