"""Verifier replicas on Ray Serve, and the backend of the service that calls them.

Each replica limits its memory and time. If a hostile claim crashes a replica, no other process is affected.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import resource
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from mtlsign.config.service import MIB, ServiceSettings
from mtlsign.service import metrics
from mtlsign.service.problems import Problem
from mtlsign.service.state import FRESH_S
from mtlsign.service.verifier.verifier import (
    GRACE_S,
    ClaimOutcome,
    OnClaimStart,
    VerificationBatchResult,
    VerificationTask,
    Verifier,
    VerifierCrashed,
)

#: Keep freed memory: feature maps are large and short-lived, and each returned page costs a page fault later.
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
TIMEOUT_EXIT_CODE = 70
#: A replica that works and answered within this many seconds counts as available without responding.
BUSY_S = 150.0


class RayServeVerifier:
    """Backend of verifier replicas. Claims on one model go to the replica that has loaded it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._ready_lock = asyncio.Lock()
        self._active_tasks = 0
        self._answered_at = self._checked_at = -math.inf
        self._is_ready = False

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Verify a task on one replica. Raises VerifierCrashed, or Problem `busy`."""
        name = hashlib.sha256(task.model.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        handle: Any = self._handle.options(multiplexed_model_id=name, stream=task.isolate)
        outcomes: list[ClaimOutcome] = []
        claim_started: bool | None = None
        self._active_tasks += 1
        try:
            if not task.isolate:
                result: VerificationBatchResult = await handle.verify.remote(task)
                self._answered_at = time.monotonic()
                return result
            claim_started = False
            async for message in handle.verify_isolated.remote(task):
                self._answered_at = time.monotonic()
                if isinstance(message, VerificationBatchResult):
                    return message
                claim_started = True
                if message is not None:
                    outcomes.append(message)
        except (BackPressureError, DeploymentUnavailableError):
            raise Problem("busy", "All verifiers are busy. Try again.", retry_after=2) from None
        except (RayError, RayServeException):
            raise VerifierCrashed(outcomes, claim_started) from None
        finally:
            self._active_tasks -= 1
        raise VerifierCrashed(outcomes, claim_started)

    async def ready(self) -> bool:
        """Return whether a replica is available, at most `FRESH_S` old: the check occupies a replica."""
        async with self._ready_lock:
            if time.monotonic() > self._checked_at + FRESH_S:
                self._is_ready = await self._check_ready()
                self._checked_at = time.monotonic()
            return self._is_ready

    async def _check_ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._handle.alive.remote(), 2.0))
        except BackPressureError:
            return True
        except TimeoutError:
            return self._active_tasks > 0 and time.monotonic() < self._answered_at + BUSY_S
        except (RayError, RayServeException):
            return False


class VerifierDeployment:
    """Verifier replica."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        self._settings = ServiceSettings.of(settings)
        metrics.configure_logging()
        torch.set_num_threads(self._settings.threads_per_replica)
        self._verifier = Verifier(self._settings)
        _limit_memory(self._settings.memory_mb * MIB)
        threading.Thread(target=self._enforce_timeout, daemon=True).start()

    def _enforce_timeout(self) -> None:
        while True:
            time.sleep(0.5)
            since = self._verifier.busy_since
            if since is not None and time.monotonic() - since > self._settings.claim_timeout_s + GRACE_S:
                metrics.configure_logging().error('{"event": "claim_timeout"}')
                os._exit(TIMEOUT_EXIT_CODE)  # a thread inside a kernel cannot be stopped otherwise

    @serve.multiplexed(max_num_models_per_replica=64)  # type: ignore[untyped-decorator]
    async def _announce_model(self, name: str) -> str:
        """Report to Ray's router that this replica has the model; the verifier holds it."""
        return name

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Verify a task."""
        await self._announce_model(serve.get_multiplexed_model_id())
        return await asyncio.to_thread(self._answer, task)

    async def verify_isolated(
        self, task: VerificationTask
    ) -> AsyncIterator[ClaimOutcome | VerificationBatchResult | None]:
        """Verify a task and stream its progress, so that a crash can be attributed to a claim.

        When a claim starts, the outcome of the previous one is sent (None for the first). The result is last.
        """
        await self._announce_model(serve.get_multiplexed_model_id())
        messages: asyncio.Queue[ClaimOutcome | VerificationBatchResult | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_claim_start(previous: ClaimOutcome | None) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, previous)

        work = asyncio.create_task(asyncio.to_thread(self._answer, task, on_claim_start))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        while not work.done() or not messages.empty():
            message = await messages.get()
            if not work.done():
                yield message
        yield work.result()

    def _answer(
        self, task: VerificationTask, on_claim_start: OnClaimStart = lambda _: None
    ) -> VerificationBatchResult:
        import torch

        torch.set_num_threads(self._settings.threads_per_replica)  # OpenMP stores the number for each thread
        return self._verifier.answer(task, on_claim_start)

    async def alive(self) -> bool:
        """Return True: the replica responds."""
        return True


def _limit_memory(additional: int) -> None:
    """Limit this process to `additional` bytes beyond its present size, so that a larger claim fails."""
    with open("/proc/self/status", encoding="ascii") as file:
        current = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = current + additional if hard == resource.RLIM_INFINITY else min(current + additional, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def replica_settings(settings: ServiceSettings) -> dict[str, Any]:
    """Return the settings in the form that Ray sends to replicas.

    Paths are absolute, settings of jobs are dropped, and so is the signing key, which each ingress reads
    from its environment.
    """
    names = ServiceSettings.model_fields.keys() - {"signing_key"}
    values = settings.model_dump(mode="json", include=set(names), exclude_none=True, by_alias=True)
    for name in ("state_dir", "identity", "passphrase_file"):
        values |= {name: str(getattr(settings, name).absolute())} if name in values else {}
    return values


def verifier_deployment(settings: ServiceSettings) -> serve.Application:
    """Return the application of the verifier replicas alone."""
    threads = settings.threads_per_replica
    options: dict[str, Any] = {
        "name": "verifier",
        "max_ongoing_requests": 2,  # one computes while the model of the other is fetched
        "max_queued_requests": 8 * max(settings.min_replicas, settings.max_replicas),
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {
            "num_cpus": threads,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), **ALLOCATOR_ENVIRONMENT}},
        },
    }
    if settings.max_replicas > settings.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas,
            "target_ongoing_requests": 1.5, "upscale_delay_s": 5, "downscale_delay_s": 120,
        }  # fmt: skip
    else:
        options["num_replicas"] = settings.min_replicas
    return serve.deployment(**options)(VerifierDeployment).bind(replica_settings(settings))
