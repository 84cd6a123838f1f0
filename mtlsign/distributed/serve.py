"""The verification service on Ray Serve: one ingress with `mtlsign.service`, and verifier replicas.

Ray places, restarts, scales and routes processes. `mtlsign.service` defines requests and answers.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mtlsign.distributed import cluster

import ray  # isort: skip
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mtlsign.config.service import ServiceSettings
from mtlsign.distributed.serve_metrics import RayMetrics
from mtlsign.distributed.serve_port import reserve_port
from mtlsign.distributed.serve_verifier import RayServeVerifier, replica_settings, verifier_deployment
from mtlsign.errors import ClusterError
from mtlsign.service import metrics
from mtlsign.service.app import make_app
from mtlsign.service.batch import runner
from mtlsign.service.http.body_limits import PROXY_HEADER
from mtlsign.service.state import AppState
from mtlsign.service.verifier.factory_parameters import declared_parameters

APP = "mtlsign"
#: Ray's name for the setting that adds middleware to its HTTP proxy; read when a cluster starts.
PROXY_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_VALUE = "mtlsign.service.http.body_limits:proxy_middlewares"
#: Settings that the proxy reads from its environment.
PROXY_LIMITS = ("max_body_mb", "body_timeout_s", "upload_timeout_s", "upload_rate_mb_s", "max_model_mb")
#: Resource that only the head node has.
HEAD = "node:__internal_head__"
#: Actor and namespace of a Serve instance, which may outlive the job that started it.
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
#: Workers that Ray's memory monitor stopped have this exit type.
OUT_OF_MEMORY = "NODE_OUT_OF_MEMORY"


class IngressDeployment:
    """Ingress: the only process with the database. It never opens a model."""

    def __init__(self, settings: dict[str, Any], handle: DeploymentHandle[Any]) -> None:
        metrics.configure_logging()
        self._state = AppState.open(
            ServiceSettings.received(settings), RayServeVerifier(handle), RayMetrics()
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Build the application inside the replica."""
        return make_app(self._state)


def build(args: ServiceSettings) -> serve.Application:
    """Return the application for `serve deploy`; `MTLSIGN_*` take precedence over the `args` of the file."""
    return make_application(ServiceSettings.load(base=args.model_dump(exclude_unset=True, by_alias=True)))


def make_application(settings: ServiceSettings) -> serve.Application:
    """Return the application with exactly these settings."""
    ingress = serve.deployment(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        # It waits for the verifiers, which need the CPUs. Its database is on the head node, the most durable.
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
    )(serve.ingress()(IngressDeployment))
    return ingress.bind(replica_settings(settings), verifier_deployment(settings))


# Ray inspects the annotation, which the import of annotations has turned into text.
build.__annotations__ = {"args": ServiceSettings, "return": Any}


def _reduce_logging() -> None:
    """Suppress Ray Serve's progress messages, which repeat those of the job."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """Return the last line of an error of Ray, which follows the traceback of another process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _serve_is_running() -> bool:
    """Return whether the cluster has a Serve instance, whose proxies then use the port."""
    try:
        ray.get_actor(CONTROLLER, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def start(settings: ServiceSettings) -> socket.socket | None:
    """Start the service on the cluster of RAY_ADDRESS or on this machine; return once it answers.

    Returns:
        A socket that keeps other services from the port until it is closed. None on a cluster that already
        runs Ray Serve.

    Raises:
        ClusterError: the port is in use, or the service does not start.
        SettingsError: the setting `factory_parameters` is invalid.
    """
    declared_parameters(settings.factory_parameters)
    joined = cluster.cluster_address_set()
    reserved = None if joined else reserve_port(settings.host, settings.port)
    _set_proxy_environment(settings)
    _reduce_logging()
    _log("joining the Ray cluster" if joined else "starting Ray on this machine")
    cluster.connect()
    if joined and _serve_is_running():
        _log("the cluster already runs Ray Serve: its address and port stay, and the service is replaced")
    elif joined:
        reserved = reserve_port(settings.host, settings.port)
    options = {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": max(settings.upload_timeout_s, settings.max_wait_s + 60),
    }
    for option, file in (("ssl_certfile", settings.tls_cert), ("ssl_keyfile", settings.tls_key)):
        options |= {option: str(file)} if file else {}
    log_options = {"enable_access_log": False}
    try:
        _log(f"starting the HTTP proxy on {settings.host}:{settings.port}")
        serve.start(proxy_location="EveryNode", http_options=options, logging_config=log_options)
        _log(f"starting {settings.min_replicas} verifier(s); loading takes about half a minute")
        serve.run(make_application(settings), name=APP, route_prefix="/", logging_config=log_options)
    except (RuntimeError, RayError, RayServeException, ValueError) as error:
        message = f"The service does not start ({_reason(error)}). Correct the cause and try again."
        raise ClusterError(message, field="serve") from None
    if joined and not proxy_limits_bodies(settings):
        warning = f"The proxy on {settings.host}:{settings.port} does not limit bodies before it reads them."
        _log(f"warning: {warning} Start Ray with {PROXY_SETTING}={PROXY_VALUE}.")
    return reserved


def _set_proxy_environment(settings: ServiceSettings) -> None:
    """Set what Ray's proxy reads from its environment when it starts."""
    os.environ.setdefault(PROXY_SETTING, PROXY_VALUE)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine starts it slowly
    for name in PROXY_LIMITS:
        os.environ[f"MTLSIGN_{name.upper()}"] = str(getattr(settings, name))
    os.environ["MTLSIGN_STATE_DIR"] = str(settings.state_dir.absolute())  # the proxy looks up tokens


def stopped_for_memory() -> dict[str, str]:
    """Return the workers that Ray's memory monitor stopped so far: node address by worker id.

    The dictionary is empty if the dashboard, which holds this list, does not answer.
    """
    from ray.util.state import list_workers
    from ray.util.state.exception import RayStateApiException

    try:
        address = ray.get_runtime_context().gcs_address  # another Ray may run on this machine
        workers = list_workers(address, filters=[("exit_type", "=", OUT_OF_MEMORY)], limit=1000, timeout=10)
    except (RayError, RayStateApiException, RuntimeError, OSError):
        return {}
    return {worker.worker_id: str(worker.ip) for worker in workers}


def proxy_limits_bodies(settings: ServiceSettings) -> bool:
    """Return whether the proxy itself refuses a too large announced body. No byte of that body is sent."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    if settings.tls_cert is None:
        connection = http.client.HTTPConnection(host, settings.port, timeout=10)
    else:  # the identity of the proxy does not matter for this check
        connection = http.client.HTTPSConnection(
            host, settings.port, timeout=10, context=ssl._create_unverified_context()
        )
    try:
        connection.request("POST", "/v1/verifications", headers={"Content-Length": str(10**14)})
        answer = connection.getresponse()
        return answer.status == 413 and answer.headers[PROXY_HEADER] == "proxy"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def stop() -> None:
    """Stop the service."""
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def batch(
    settings: ServiceSettings, claims: Sequence[Any], on_results: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Verify many claims on verifier replicas that end with the call.

    Args:
        settings: settings of the queue and the replicas.
        claims: parsed JSON values.
        on_results: called with results in the order of the claims, each with its signed verdict.

    Raises:
        ClusterError: the replicas do not start, or the queue fails.
        KeyMaterialError: an identity cannot be read.
    """
    _reduce_logging()
    cluster.connect()
    name = f"{APP}-batch-{os.getpid()}"
    try:
        serve.start(proxy_location="Disabled")  # no HTTP; a service on the same cluster keeps its proxy
        handle = serve.run(verifier_deployment(settings), name=name, route_prefix=None)
    except (RuntimeError, RayError, RayServeException) as error:
        with suppress(RuntimeError, RayError, RayServeException):
            serve.delete(name)
        message = f"The verifiers do not start ({_reason(error)}). Correct the cause and try again."
        raise ClusterError(message, field="serve") from None
    try:
        asyncio.run(runner.verify_batch(settings, RayServeVerifier(handle), claims, on_results))
    finally:
        serve.delete(name)
