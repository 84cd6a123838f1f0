"""The verification service on Ray Serve: an ingress that holds `mtlsign.service`, and verifying replicas.

Ray places, restarts, scales and routes; what is asked and answered is `mtlsign.service`'s. A verifying
replica has limits of its own on memory and time: whatever a hostile claim does to it, it dies alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import logging
import math
import os
import resource
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from mtlsign.distributed import cluster

import ray  # isort: skip
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import metrics as ray_metrics

from mtlsign.config.service import MIB, PREFIX, ServiceSettings
from mtlsign.errors import ClusterError
from mtlsign.service import metrics
from mtlsign.service.app import make_app
from mtlsign.service.batch import runner
from mtlsign.service.http.body_limits import PROXY_HEADER
from mtlsign.service.metrics import METRICS
from mtlsign.service.problems import Problem
from mtlsign.service.state import FRESH_S, AppState
from mtlsign.service.verifier.verifier import (
    GRACE_S,
    ClaimOutcome,
    VerificationBatchResult,
    VerificationTask,
    Verifier,
    VerifierCrashed,
)

APP = "mtlsign"
#: Ray's name for the setting that puts our limits into its HTTP proxy; read when a cluster starts.
PROXY_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_VALUE = "mtlsign.service.http.body_limits:proxy_middlewares"
#: What every head node has, and no other.
HEAD = "node:__internal_head__"
#: Feature maps are large and short-lived: returned to the system, each costs its page faults again.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
LOST = 70
#: A verifier that answered so many seconds ago and has work is taken to be there, though it does not say so.
BUSY_S = 150.0
BOUNDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]


class RayMetrics:
    """Figures for Prometheus, through Ray's own exporter on every node."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        for name, (kind, text, label) in METRICS.items():
            keys = (label,) if label else ()
            if kind == "histogram":
                self._made[name] = ray_metrics.Histogram(name, text, boundaries=BOUNDS, tag_keys=keys)
            else:
                made = ray_metrics.Counter if kind == "counter" else ray_metrics.Gauge
                self._made[name] = made(name, text, tag_keys=keys)

    def add(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Count, observe or set."""
        kind, _, key = METRICS[name]
        tags = {key: label or "none"} if key else None
        if kind == "counter":
            if value > 0:
                self._made[name].inc(value, tags)
        elif kind == "gauge":
            self._made[name].set(value, tags)
        else:
            self._made[name].observe(value, tags)


class RayServeVerifier:
    """A backend of verifying replicas; claims on one model go to the replica that has it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._asking = asyncio.Lock()
        self._under_way = 0
        self._heard = self._looked = -math.inf
        self._there = False

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Ask one replica. Raises Lost, or Problem `busy`."""
        name = hashlib.sha256(task.model.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        handle: Any = self._handle.options(multiplexed_model_id=name, stream=task.careful)
        told: list[ClaimOutcome] = []
        begun: bool | None = None
        self._under_way += 1
        try:
            if not task.careful:
                answer: VerificationBatchResult = await handle.verify.remote(task)
                self._heard = time.monotonic()
                return answer
            begun = False
            async for one in handle.verify_carefully.remote(task):
                self._heard = time.monotonic()
                if isinstance(one, VerificationBatchResult):
                    return one
                begun = True
                if one is not None:
                    told.append(one)
        except (BackPressureError, DeploymentUnavailableError):
            raise Problem("busy", "all verifiers are busy", retry_after=2) from None
        except (RayError, RayServeException):
            raise VerifierCrashed(told, begun) from None
        finally:
            self._under_way -= 1
        raise VerifierCrashed(told, begun)

    async def ready(self) -> bool:
        """Whether a replica is there, as of a few seconds ago: the question takes a place at a replica. One
        that is too busy to say so is there.
        """
        async with self._asking:
            if time.monotonic() > self._looked + FRESH_S:
                self._there = await self._look()
                self._looked = time.monotonic()
            return self._there

    async def _look(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._handle.alive.remote(), 2.0))
        except BackPressureError:
            return True
        except TimeoutError:
            return self._under_way > 0 and time.monotonic() < self._heard + BUSY_S
        except (RayError, RayServeException):
            return False


class VerifierDeployment:
    """A verifying replica."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        self._settings = ServiceSettings.of(settings)
        metrics.configure_logging()
        torch.set_num_threads(self._settings.threads)
        self._verifier = Verifier(self._settings)
        _bound_memory(self._settings.memory_mb * MIB)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.5)
            since = self._verifier.busy_since
            if since is not None and time.monotonic() - since > self._settings.claim_s + GRACE_S:
                metrics.configure_logging().error('{"event": "claim_too_long"}')
                os._exit(LOST)  # a thread inside a kernel cannot be stopped otherwise

    @serve.multiplexed(max_num_models_per_replica=64)  # type: ignore[untyped-decorator]
    async def _hold(self, name: str) -> str:
        """Tell Ray's router that this replica has the model; the verifier keeps it."""
        return name

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        """Answer one task."""
        await self._hold(serve.get_multiplexed_model_id())
        return await asyncio.to_thread(self._answer, task)

    async def verify_carefully(
        self, task: VerificationTask
    ) -> AsyncIterator[ClaimOutcome | VerificationBatchResult | None]:
        """Answer one task. As each claim begins the outcome of the one before it is told, at last the answer:
        whoever asked knows at which claim this process died.
        """
        await self._hold(serve.get_multiplexed_model_id())
        told: asyncio.Queue[ClaimOutcome | VerificationBatchResult | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(one: ClaimOutcome | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, one)

        work = asyncio.create_task(asyncio.to_thread(self._answer, task, tell))
        work.add_done_callback(lambda _: told.put_nowait(None))
        while not work.done() or not told.empty():
            one = await told.get()
            if not work.done():
                yield one
        yield work.result()

    def _answer(
        self, task: VerificationTask, tell: Callable[[ClaimOutcome | None], None] = lambda _: None
    ) -> VerificationBatchResult:
        import torch

        torch.set_num_threads(self._settings.threads)  # OpenMP keeps the number for each thread
        return self._verifier.answer(task, tell)

    async def alive(self) -> bool:
        """Yes."""
        return True


class IngressDeployment:
    """The ingress: one process with the service's file. It never touches a model."""

    def __init__(self, settings: dict[str, Any], handle: DeploymentHandle[Any]) -> None:
        metrics.configure_logging()
        self._office = AppState.open(
            ServiceSettings.received(settings), RayServeVerifier(handle), RayMetrics()
        )

    def __serve_build_asgi_app__(self) -> Any:
        """The app, made in the replica."""
        return make_app(self._office)


def _bound_memory(more: int) -> None:
    """Let this process take at most `more` bytes beyond what it has; a larger claim fails, or its process."""
    with open("/proc/self/status", encoding="ascii") as file:
        now = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _plain(settings: ServiceSettings) -> dict[str, Any]:
    """Settings as they travel: absolute, without what a job adds, and without the signing key, which each
    ingress reads itself.
    """
    names = ServiceSettings.model_fields.keys() - {"signing_key"}
    found = settings.model_dump(mode="json", include=set(names), exclude_none=True, by_alias=True)
    for name in ("state", "identity", "passphrase_file"):
        found |= {name: str(getattr(settings, name).absolute())} if name in found else {}
    return found


def verifier_deployment(settings: ServiceSettings) -> serve.Application:
    """The verifying deployment alone."""
    options: dict[str, Any] = {
        "name": "verify",
        "max_ongoing_requests": 2,  # one computes while the other's model is fetched
        "max_queued_requests": 8 * max(settings.verifiers, settings.max_verifiers),
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {
            "num_cpus": settings.threads,
            "num_gpus": settings.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.threads), **KEEP_MEMORY}},
        },
    }
    if settings.max_verifiers > settings.verifiers:
        options["autoscaling_config"] = {
            "min_replicas": settings.verifiers, "max_replicas": settings.max_verifiers, "target_ongoing_requests": 1.5,
            "upscale_delay_s": 5, "downscale_delay_s": 120,
        }  # fmt: skip
    else:
        options["num_replicas"] = settings.verifiers
    return serve.deployment(**options)(VerifierDeployment).bind(_plain(settings))


def build(args: ServiceSettings) -> serve.Application:
    """The service as `serve deploy jobs/serve.yaml` wants it; `MTLSIGN_*` win over the file's `args`."""
    return make_application(ServiceSettings.load(base=args.model_dump(exclude_unset=True, by_alias=True)))


def make_application(settings: ServiceSettings) -> serve.Application:
    """The service with exactly these settings."""
    gate = serve.deployment(
        name="gate",
        num_replicas=1,
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        # It waits for others, verifiers get the CPUs; and its file is on the head, which outlives workers.
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
    )(serve.ingress()(IngressDeployment))
    return gate.bind(_plain(settings), verifier_deployment(settings))


# Ray looks at the annotation itself, which the import above turned into text.
build.__annotations__ = {"args": ServiceSettings, "return": Any}


def _quieten() -> None:
    """Ray Serve tells what we say ourselves, and that it connects to what it has just started."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def start(settings: ServiceSettings) -> None:
    """Start the service on the cluster that is there, or on this machine; returns once it answers.

    Raises: ClusterError.
    """
    os.environ.setdefault(PROXY_SETTING, PROXY_VALUE)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine starts it slowly
    for name in ("max_body_mb", "body_s", "upload_s", "upload_mb_s", "max_model_mb"):  # the proxy reads these
        os.environ[PREFIX + name.upper()] = str(getattr(settings, name))
    _quieten()
    joined = cluster.cluster_address_set()
    cluster.connect()
    options = {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": max(settings.upload_s, settings.max_wait_s + 60),
    }
    for option, file in (("ssl_certfile", settings.tls_cert), ("ssl_keyfile", settings.tls_key)):
        options |= {option: str(file)} if file else {}
    quiet = {"enable_access_log": False}
    try:
        serve.start(proxy_location="EveryNode", http_options=options, logging_config=quiet)
        serve.run(make_application(settings), name=APP, route_prefix="/", logging_config=quiet)
    except (RuntimeError, RayError, RayServeException, ValueError) as error:
        raise ClusterError(f"the service does not start ({str(error)[:300]})", field="serve") from None
    if joined and not bounds_bodies(settings):
        where = (
            f"the proxy on {settings.host}:{settings.port} is not seen to bound bodies before it reads them"
        )
        print(f"warning: {where}; start Ray with {PROXY_SETTING}={PROXY_VALUE}", file=sys.stderr, flush=True)


def bounds_bodies(settings: ServiceSettings) -> bool:
    """Whether the proxy refuses by itself what announces too large a body; nothing of it is sent."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    if settings.tls_cert is None:
        link = http.client.HTTPConnection(host, settings.port, timeout=10)
    else:  # whose proxy it is does not matter here
        link = http.client.HTTPSConnection(
            host, settings.port, timeout=10, context=ssl._create_unverified_context()
        )
    try:
        link.request("POST", "/v1/verifications", headers={"Content-Length": str(10**14)})
        answer = link.getresponse()
        return answer.status == 413 and answer.headers[PROXY_HEADER] == "proxy"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


def stop() -> None:
    """Take the service down."""
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def batch(
    settings: ServiceSettings, claims: Sequence[Any], keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Verify many claims with a short-lived app of verifying replicas alone. `keep` gets the results in
    order as they come, each with its signed verdict.

    Raises: ClusterError, KeyMaterialError.
    """
    _quieten()
    cluster.connect()
    name = f"{APP}-batch-{os.getpid()}"
    try:
        serve.start(proxy_location="Disabled")  # no HTTP here; a service that is there keeps its own
        handle = serve.run(verifier_deployment(settings), name=name, route_prefix=None)
    except (RuntimeError, RayError, RayServeException) as error:
        with suppress(RuntimeError, RayError, RayServeException):
            serve.delete(name)
        raise ClusterError(f"the verifiers do not start ({str(error)[:300]})", field="serve") from None
    try:
        asyncio.run(runner.verify_batch(settings, RayServeVerifier(handle), claims, keep))
    finally:
        serve.delete(name)
