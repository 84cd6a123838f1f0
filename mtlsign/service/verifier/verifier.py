"""Verification of tasks: claims on one model in, one outcome for each claim out, in the same order.

An outcome is `{"verdict": …, "key": id}` or `{"problem": …}`. Models are cached by digest, so that claims on
one model share its download, digest and tensors. A bad claim does not affect the other claims of its task.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.errors import MTLSignError
from mtlsign.models.factories import Factory, trusted_factories
from mtlsign.service import metrics
from mtlsign.service.fetch.https import Resolver, Transport, system_resolver
from mtlsign.service.fetch.model_cache import ModelFetcher
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import OpenedClaim, read_bundle
from mtlsign.service.verifier.detectors import SharedDetector, check_compute_budget, detector_for_claim
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.service.verifier.lru_cache import LruCache
from mtlsign.watermark.keys.spec import Spec
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.verdict import Verdict

ClaimOutcome = dict[str, Any]
#: Called when a claim starts, with the outcome of the previous claim of the task (None for the first).
OnClaimStart = Callable[[ClaimOutcome | None], None]
#: Bytes of the key images in the detector cache.
DETECTOR_BYTES = 128 * MIB
#: Cached verifier models: an architecture with the canonical form of one base model. They are read only.
MAX_GRAPHS = 8
#: Bytes of the verifier models of all cached detectors. A model of a spread head holds a claimant's bases.
MODEL_BYTES = 512 * MIB
#: Cached results of `check_compute_budget`.
MAX_BUDGETS = 256
#: A claim ends between two operations after `claim_timeout_s`. A verifier that is still inside one operation
#: is replaced after this many further seconds.
GRACE_S = 15.0


@dataclass(frozen=True)
class OpenedClaimRef:
    """One opened claim: the bytes of its bundle, or their location. Never shown by `repr`."""

    bundle: bytes | None = field(default=None, repr=False)
    location: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class VerificationTask:
    """Claims on one model: its location, the digest that it must have (or None), and the claims.

    `isolate`: a verifier has crashed on these claims. Report when each claim starts, so that the next crash
    can be attributed to one of them.
    """

    model: str
    sha256: str | None
    claims: tuple[OpenedClaimRef, ...]
    isolate: bool = False


@dataclass
class VerificationBatchResult:
    """Outcomes in the order of the claims, and seconds by stage."""

    outcomes: list[ClaimOutcome]
    seconds: dict[str, float] = field(default_factory=dict)
    cached: bool = False


class VerifierBackend(Protocol):
    """Executor of verification tasks: this process, or replicas on Ray Serve."""

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Verify one task. Raises `VerifierCrashed`, or `Problem` `busy`."""

    async def ready(self) -> bool:
        """Return whether a verifier is available."""


class VerifierCrashed(Exception):
    """The verifier of a task crashed or exceeded its time limit; the task may be retried.

    Args:
        outcomes: outcomes reported before the crash, in order.
        claim_started: whether the claim after them had started, so that it is suspected; None: unknown.
    """

    def __init__(self, outcomes: Sequence[ClaimOutcome] = (), claim_started: bool | None = None) -> None:
        super().__init__("The verifier crashed.")
        self.outcomes, self.claim_started = list(outcomes), claim_started


class ClaimTimeout(BaseException):
    """The time limit of a claim is exceeded. Not an `Exception`, because readers of tensors catch those."""


class DeadlineMode(TorchFunctionMode):
    """Mode that ends a computation between two torch operations. Raises `ClaimTimeout`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the time, then call the operation."""
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
    """Verifier of one process. `answer` blocks; threads that call it compute in turn.

    Args:
        settings: limits, allowed locations and the policy of verdicts.
        resolver: resolver of host names.
        transport: sender of https requests; None: urllib3.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        resolver: Resolver = system_resolver,
        transport: Transport | None = None,
    ) -> None:
        self.settings = settings
        self.fetcher = ModelFetcher(settings, resolver=resolver, transport=transport)
        self.factories: Mapping[str, Factory] = trusted_factories(settings.trusted_factory)
        self.device = "cuda" if settings.gpus_per_replica and torch.cuda.is_available() else "cpu"
        self._suspects: LruCache[str, LazySafetensors] = LruCache(
            lambda suspects: (
                len(suspects) > self.settings.cache_models
                or sum(s.cached_bytes for s in suspects) > self.settings.cache_tensors_mb * MIB
            )
        )
        self._detectors: LruCache[tuple[str, str], SharedDetector] = LruCache(
            lambda detectors: (
                sum(d.key_bytes for d in detectors) > DETECTOR_BYTES
                or sum(d.spec.has_trained_head for d in detectors) > MAX_GRAPHS
                or _model_bytes(detectors) > MODEL_BYTES
            )
        )
        self._graphs: LruCache[tuple[Any, ...], SharedDetector] = LruCache(
            lambda graphs: len(graphs) > MAX_GRAPHS or _model_bytes(graphs) > MODEL_BYTES
        )
        self._budgets: LruCache[tuple[Any, ...], float] = LruCache(lambda b: len(b) > MAX_BUDGETS)
        self._compute = threading.Lock()
        self.busy_since: float | None = None

    def answer(
        self, task: VerificationTask, on_claim_start: OnClaimStart = lambda _: None
    ) -> VerificationBatchResult:
        """Verify every claim of a task. Any error of a claim becomes its own problem.

        Args:
            task: the task.
            on_claim_start: called when a claim starts, with the outcome of the previous one.
        """
        seconds: dict[str, float] = dict.fromkeys(("fetch", "load", "prepare", "forward"), 0.0)
        try:
            suspect, cached = self._load_model(task, seconds)
        except Exception as error:
            return VerificationBatchResult([_failed(error) for _ in task.claims], seconds)
        outcomes: list[ClaimOutcome] = []
        for claim in task.claims:
            start = time.perf_counter()
            try:  # without the lock: a slow host must not delay other claims
                data = claim.bundle
                if data is None:
                    data = self.fetcher.fetch_bundle(claim.location or "")
            except Exception as error:
                data = None
                outcome = _failed(error)
            seconds["fetch"] += time.perf_counter() - start
            with self._compute:
                on_claim_start(outcomes[-1] if outcomes else None)
                if data is not None:
                    self.busy_since = time.monotonic()
                    try:
                        outcome = self._verify_claim(data, suspect, seconds)
                    finally:
                        self.busy_since = None
            outcomes.append(outcome)
        with self._compute:
            self._suspects.evict()
        return VerificationBatchResult(outcomes, seconds, cached=cached)

    def _load_model(self, task: VerificationTask, seconds: dict[str, float]) -> tuple[LazySafetensors, bool]:
        """Return the model of a task, and whether its file was cached."""
        start = time.perf_counter()
        digest, path, cached = self.fetcher.fetch_model(task.model)
        seconds["fetch"] = time.perf_counter() - start
        if task.sha256 is not None and digest != task.sha256:
            detail = f"The model has the digest {digest}. Correct sha256 or the location."
            raise Problem("wrong-digest", detail)
        with self._compute:
            start = time.perf_counter()
            suspect = self._suspect(digest, path)
            seconds["load"] = time.perf_counter() - start
        return suspect, cached

    def _suspect(self, digest: str, path: Path) -> LazySafetensors:
        suspect = self._suspects.get(digest)
        if suspect is None:
            suspect = LazySafetensors(path, digest, max_tensors=self.settings.max_tensors)
            self._suspects.put(digest, suspect)
        return suspect

    def _verify_claim(self, data: bytes, suspect: LazySafetensors, seconds: dict[str, float]) -> ClaimOutcome:
        start, settings = time.perf_counter(), self.settings
        try:
            with DeadlineMode(settings.claim_timeout_s):
                opened = read_bundle(data)
                detector = self._detector(opened)
                seconds["prepare"] += time.perf_counter() - start
                start = time.perf_counter()
                verdict = verify(
                    suspect, detector, bits=settings.min_evidence_bits, gamma=settings.gamma,
                    controls=settings.control_keys, model_digest=suspect.digest,
                )  # fmt: skip
                seconds["forward"] += time.perf_counter() - start
            return {
                "verdict": json_safe(verdict),
                "key": opened.key_id,
                "claim": opened.claim,
                "bound": opened.bound,
            }
        except ClaimTimeout:
            limit = f"The claim took longer than {settings.claim_timeout_s:g} seconds."
            detail = f"{limit} Verify it on your own machine (jobs/verify.py)."
            return {"problem": Problem("too-long", detail).document()}
        except Exception as error:  # a hostile claim must not end its task
            return _failed(error)

    def _detector(self, opened: OpenedClaim) -> SharedDetector:
        # The digest of a trained head is part of the name, because the head is not derived from the key.
        name = (opened.key_id, opened.head_digest)
        detector = self._detectors.get(name)
        if detector is None:
            spec = opened.spec
            kind = (spec.architecture_fields, spec.readouts, spec.carrier)
            if self._budgets.get(kind) is None:
                self._budgets.put(kind, check_compute_budget(spec, self.settings, self.factories))
                self._budgets.evict()
            detector = self._build_detector(spec, opened)
            self._detectors.put(name, detector)
        self._detectors.evict()
        return detector

    def _build_detector(self, spec: Spec, opened: OpenedClaim) -> SharedDetector:
        if spec.has_trained_head:
            return detector_for_claim(opened, self.factories, device=self.device)
        kind = (spec.architecture_fields, spec.readouts, spec.carrier, spec.reference)
        shared = self._graphs.get(kind)
        if shared is not None:
            return shared.with_key(opened)
        detector = detector_for_claim(opened, self.factories, device=self.device)
        self._graphs.put(kind, detector.without_key_data())
        self._graphs.evict()
        return detector


def _model_bytes(detectors: Iterable[SharedDetector]) -> int:
    """Return the bytes of the models of all detectors; a shared one counts once."""
    sizes: dict[int, int] = {}
    for detector in detectors:
        sizes |= detector.model_bytes
    return sum(sizes.values())


def _failed(error: Exception) -> ClaimOutcome:
    """Return the outcome of a claim that could not be verified."""
    if isinstance(error, Problem):
        return {"problem": error.document()}
    if isinstance(error, MTLSignError):
        return {"problem": problem_from_error(error, about="bundle").document()}
    if isinstance(error, MemoryError):
        detail = "The claim needs more memory than a verifier has. Verify it on your own machine."
        return {"problem": Problem("too-large", detail).document()}
    if isinstance(error, OSError):
        detail = "The model is no longer in the cache. Try again."
        return {"problem": Problem("unreachable", detail).document()}
    metrics.log_exception("claim_failed", error)
    detail = f"The claim could not be verified ({type(error).__name__}). The failure was logged."
    return {"problem": Problem("internal", detail).document()}


def json_safe(verdict: Verdict) -> dict[str, Any]:
    """Return the fields of a verdict as JSON values: infinite bits become the largest float."""
    return {
        name: (1e308 if value > 0 else None)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in verdict.to_json().items()
    }


class InProcessVerifier:
    """Backend in this process: tasks run in threads, and one of them computes at a time."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Verify one task."""
        return await asyncio.to_thread(self.verifier.answer, task)

    async def ready(self) -> bool:
        """Return True."""
        return True
