"""What a verifying replica does: claims on one model in, one outcome for each out, in order.

An outcome is `{"verdict": …, "key": id}` or `{"problem": …}`. Models are kept by digest, so that claims on
the same model share one download, one digest and one load; a bad claim never touches its neighbours.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import MTLSignError
from mtlsign.models.factories import Factory, load_factory
from mtlsign.service import metrics
from mtlsign.service.fetch.https import Resolver, Transport, system_resolver
from mtlsign.service.fetch.model_cache import ModelFetcher
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import OpenedClaim, read_bundle
from mtlsign.service.verifier.detectors import SharedDetector, check_compute_budget, detector_for_claim
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.watermark.keys.spec import Spec
from mtlsign.watermark.verification.detector import Verdict, verify

ClaimOutcome = dict[str, Any]
#: Key sets that a verifier keeps, by the bytes of their images.
PROBE_BYTES = 128 * MIB
#: Graphs that a verifier keeps: an architecture with one W0's frame. Their weights are never written to.
GRAPHS = 8
#: A claim ends between two operations after `claim_s`; a verifier stuck in one is replaced this much later.
GRACE_S = 15.0


@dataclass(frozen=True)
class OpenedClaimRef:
    """One claim: the bundle's bytes or the pointer to them. Never shown by `repr`."""

    bundle: bytes | None = field(default=None, repr=False)
    pointer: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class VerificationTask:
    """Claims on one model: its pointer, the digest that it must have (or None), and the claims.

    `careful`: a verifier died of these or beside them; tell which claim is at work.
    """

    model: str
    sha256: str | None
    questions: tuple[OpenedClaimRef, ...]
    careful: bool = False


@dataclass
class VerificationBatchResult:
    """Outcomes in the order of the questions, and seconds by stage."""

    outcomes: list[ClaimOutcome]
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False


class VerifierBackend(Protocol):
    """Whoever answers tasks: this process, or replicas of Ray Serve."""

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Answer one task. Raises `Lost` when the one who had it died, `Problem` when there is no room."""

    async def ready(self) -> bool:
        """Whether somebody is there to answer."""


class VerifierCrashed(Exception):
    """Whoever had the task died or was too slow; it may be tried again.

    Args:
        outcomes: those that were told before, in order.
        begun: whether the claim after them had begun, so that it is the suspect; None: nobody knows.
    """

    def __init__(self, outcomes: Sequence[ClaimOutcome] = (), begun: bool | None = None) -> None:
        super().__init__("lost")
        self.outcomes, self.begun = list(outcomes), begun


class ClaimTimeout(BaseException):
    """A claim's time is up. No `Exception`: what reads hostile tensors turns those into verdicts."""


class DeadlineMode(TorchFunctionMode):
    """Ends a computation between two operations when its time is up. Raises OutOfTime."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the clock, then call."""
        if time.monotonic() > self.end:
            raise ClaimTimeout
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if _is_allocation_failure(error):
                raise MemoryError(str(error)) from None
            raise


def _is_allocation_failure(error: RuntimeError) -> bool:
    """Return whether PyTorch could not allocate memory.

    This is the only place that reads the text: PyTorch's CPU allocator raises a bare RuntimeError.
    """
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Verifier:
    """One verifying process. Blocking; `answer` may be called from several threads, which compute in turn."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        resolver: Resolver = system_resolver,
        transport: Transport | None = None,
    ) -> None:
        self.settings = settings
        self.library = ModelFetcher(settings, resolver=resolver, transport=transport)
        self.factories: Mapping[str, Factory] = (
            {settings.factory: load_factory(settings.factory)} if settings.factory else {}
        )
        self.device = "cuda" if settings.gpus and torch.cuda.is_available() else "cpu"
        self._suspects: OrderedDict[str, LazySafetensors] = OrderedDict()
        self._probes: OrderedDict[tuple[str, str], SharedDetector] = OrderedDict()
        self._graphs: OrderedDict[tuple[Any, ...], SharedDetector] = OrderedDict()
        self._checked: OrderedDict[tuple[Any, ...], float] = OrderedDict()
        self._compute = threading.Lock()
        self.busy_since: float | None = None

    def answer(
        self, task: VerificationTask, tell: Callable[[ClaimOutcome | None], None] = lambda _: None
    ) -> VerificationBatchResult:
        """Answer every claim of a task; whatever is wrong with one of them is its own problem.

        `tell` is called when a claim begins, with the outcome of the one before it.
        """
        seconds: dict[str, float] = dict.fromkeys(("fetch", "load", "prepare", "forward"), 0.0)
        start = time.perf_counter()
        try:
            digest, path, cached = self.library.model(task.model)
            seconds["fetch"] = time.perf_counter() - start
            if task.sha256 is not None and digest != task.sha256:
                raise Problem("wrong-digest", f"the pointer leads to {digest}")
            with self._compute:
                start = time.perf_counter()
                suspect = self._suspect(digest, path)
                seconds["load"] = time.perf_counter() - start
        except Exception as error:
            return VerificationBatchResult([_failed(error) for _ in task.questions], seconds)
        outcomes: list[ClaimOutcome] = []
        for question in task.questions:
            start = time.perf_counter()
            try:  # without the lock: a slow host delays nobody else's claims
                data = question.bundle
                if data is None:
                    data = self.library.bundle(question.pointer or "")
            except Exception as error:
                data = None
                outcome = _failed(error)
            seconds["fetch"] += time.perf_counter() - start
            with self._compute:
                tell(outcomes[-1] if outcomes else None)
                if data is not None:
                    self.busy_since = time.monotonic()
                    try:
                        outcome = self._one(data, suspect, seconds)
                    finally:
                        self.busy_since = None
            outcomes.append(outcome)
        with self._compute:
            self._forget()
        return VerificationBatchResult(outcomes, seconds, cached=cached)

    def _suspect(self, digest: str, path: Any) -> LazySafetensors:
        found = self._suspects.pop(digest, None) or LazySafetensors(
            path, digest, max_tensors=self.settings.max_tensors
        )
        self._suspects[digest] = found
        return found

    def _forget(self) -> None:
        while len(self._suspects) > 1 and (
            len(self._suspects) > self.settings.cache_models
            or sum(one.kept_bytes for one in self._suspects.values()) > self.settings.cache_tensors_mb * MIB
        ):
            self._suspects.popitem(last=False)

    def _one(self, data: bytes, suspect: LazySafetensors, seconds: dict[str, float]) -> ClaimOutcome:
        start = time.perf_counter()
        try:
            with DeadlineMode(self.settings.claim_s):
                opened = read_bundle(data)
                detector = self._probe(opened)
                seconds["prepare"] += time.perf_counter() - start
                start = time.perf_counter()
                verdict = verify(
                    suspect, detector, bits=self.settings.bits, gamma=self.settings.gamma, controls=self.settings.controls,
                    model_digest=suspect.digest,
                )  # fmt: skip
                seconds["forward"] += time.perf_counter() - start
            return {
                "verdict": json_safe(verdict),
                "key": opened.key_id,
                "claim": opened.claim,
                "bound": opened.bound,
            }
        except ClaimTimeout:
            detail = f"the claim took over {self.settings.claim_s:g} seconds; verify it at home"
            return {"problem": Problem("too-long", detail).document()}
        except Exception as error:  # a hostile claim never stops its neighbours
            return _failed(error)

    def _probe(self, opened: OpenedClaim) -> SharedDetector:
        name = (opened.key_id, opened.head_digest)  # a trained head is anybody's, and no part of the key
        found = self._probes.pop(name, None)
        if found is None:
            spec = opened.spec
            kind = (spec.graph_fields, spec.taps, spec.carrier, spec.n)
            if kind not in self._checked:
                self._checked[kind] = check_compute_budget(spec, self.settings, self.factories)
                while len(self._checked) > 256:
                    self._checked.popitem(last=False)
            found = self._built(spec, opened)
        self._probes[name] = found
        while len(self._probes) > 1 and (
            sum(one.size for one in self._probes.values()) > PROBE_BYTES
            or sum(one.spec.head.kind != "keyed" for one in self._probes.values()) > GRAPHS
        ):
            self._probes.popitem(last=False)
        return found

    def _built(self, spec: Spec, opened: OpenedClaim) -> SharedDetector:
        kind = (spec.graph_fields, spec.taps, spec.carrier, spec.reference)
        if spec.head.kind != "keyed":
            return detector_for_claim(opened, self.factories, device=self.device)
        shared = self._graphs.pop(kind, None)
        found = (
            shared.like(opened) if shared else detector_for_claim(opened, self.factories, device=self.device)
        )
        self._graphs[kind] = shared or found.without_key_set()
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return found


def _failed(error: Exception) -> ClaimOutcome:
    """The problem of a claim that could not be judged."""
    if isinstance(error, Problem):
        return {"problem": error.document()}
    if isinstance(error, MTLSignError):
        return {"problem": problem_from_error(error, about="bundle").document()}
    if isinstance(error, MemoryError):
        return {"problem": Problem("too-large", "the claim needs more memory than a verifier has").document()}
    if isinstance(error, OSError):
        return {"problem": Problem("unreachable", "the cache lost the model; try again").document()}
    metrics.log_exception("claim_failed", error)
    detail = f"the claim could not be judged ({type(error).__name__})"
    return {"problem": Problem("internal", detail).document()}


def json_safe(verdict: Verdict) -> dict[str, Any]:
    """The verdict's fields as JSON can say them: infinite bits become the largest float."""
    found = verdict.to_json()
    return {
        name: (1e308 if value > 0 else None)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in found.items()
    }


class InProcessVerifier:
    """A backend in this process: tasks run in threads, one computing at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Answer one task."""
        return await asyncio.to_thread(self.verifier.answer, task)

    async def ready(self) -> bool:
        """Always."""
        return True
