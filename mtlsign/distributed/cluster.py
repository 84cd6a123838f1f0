"""Connection to a Ray cluster: attach to one or start one, check resources, run checks on every node."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

# Ray reads these variables when it is imported.
for _name, _value in {
    # No report of usage to Ray's makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    # No second copy of the workers' output.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Lost workers are detected within half a second.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers share this interpreter's environment. Otherwise Ray builds one on each node for `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A thread that calls Ray while an interrupted process ends its cluster must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray prints messages about lost workers to standard output even with log_to_driver=False. There they
    # would spoil the document of `--json`. This pattern drops all of them. They remain in Ray's log files,
    # and Ray Train reports lost workers as errors.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from mtlsign.errors import ClusterError, MTLSignError, SettingsError  # noqa: E402

#: Seconds between two looks at the resources while an autoscaler adds nodes.
POLL_S = 2.0
_MIN_OBJECT_STORE_BYTES, _MAX_OBJECT_STORE_BYTES = 256 * 2**20, 2 * 2**30


class WorkerSettings(Protocol):
    """Settings that state how many workers of which size a job needs."""

    @property
    def workers(self) -> int:
        """Number of workers."""

    @property
    def cpus_per_worker(self) -> int | None:
        """CPUs of one worker; None: an even share of this machine, or one CPU on a cluster."""

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of one worker."""

    @property
    def resource_timeout_s(self) -> int:
        """Seconds to wait for an autoscaler."""


def cluster_address_set() -> bool:
    """Return True if there is a cluster to join (`ray job submit`, RAY_ADDRESS, or an earlier ray.init)."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def require_owner(owner: Path | None) -> None:
    """Raise `SettingsError` if a job on a cluster names no identity.

    An identity that the job generated would be lost together with the disk of the head node.
    """
    if owner is None and cluster_address_set():
        raise SettingsError(
            "An identity is required on a cluster, because its disks are temporary. Create one with "
            "jobs/identity.py and pass its path.",
            field="owner",
        )


def check_local_cpus(settings: WorkerSettings) -> None:
    """Raise `ClusterError` before Ray starts if this machine alone has too few CPUs."""
    needed, available = settings.workers * (settings.cpus_per_worker or 1), os.cpu_count() or 1
    if not cluster_address_set() and needed > available:
        raise ClusterError(
            f"{settings.workers} workers need {needed} CPUs, but this machine has {available}. "
            "Lower --workers or --cpus-per-worker, or join a cluster with RAY_ADDRESS.",
            field="workers",
        )


def is_single_machine() -> bool:
    """Return True if every living node runs on the machine of this process."""
    own_address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return all(node["NodeManagerAddress"] == own_address for node in living_nodes())


def living_nodes() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def available_resources() -> dict[str, float]:
    """Return the CPUs and GPUs of the whole cluster, in use or not."""
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {name: value for name, value in total.items() if name in ("CPU", "GPU")}


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that ends with this process.

    Does nothing if this process is already connected.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **quiet)
        else:
            _start_local(quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ClusterError(
            f"The cluster cannot be reached or started ({reason}). Check RAY_ADDRESS.", field="ray"
        ) from None


def _start_local(quiet: Mapping[str, Any]) -> None:
    paths = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}}
    # The watcher of preempted nodes is one more process, and no provider preempts this machine.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # With the address "local", Ray ignores a cluster that an earlier `ray start` left on this machine.
    ray.init(
        address="local", num_cpus=os.cpu_count() or 1, include_dashboard=True, dashboard_port=0,
        runtime_env=environment,
        object_store_memory=max(_MIN_OBJECT_STORE_BYTES, min(_MAX_OBJECT_STORE_BYTES, memory // 5)), **quiet,
    )  # fmt: skip


def worker_resources(settings: WorkerSettings) -> dict[str, float]:
    """Return the resources that one worker reserves, by Ray's names (`CPU`, `GPU`)."""
    cpus = settings.cpus_per_worker
    if cpus is None:
        nodes = living_nodes()
        total = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
        cpus = max(1, total // max(1, settings.workers)) if len(nodes) == 1 else 1
    gpus = {"GPU": float(settings.gpus_per_worker)} if settings.gpus_per_worker else {}
    return {"CPU": float(cpus), **gpus}


def max_placeable_workers(workers: int, each: Mapping[str, float]) -> int:
    """Return how many workers the living nodes could hold if they were idle, at most `workers`.

    Args:
        workers: upper limit.
        each: resources of one worker, as `worker_resources` returns them.
    """
    count = 0
    for node in living_nodes():
        count += min(int(node["Resources"].get(kind, 0) // need) for kind, need in each.items() if need)
    return min(count, workers)


def wait_for_resources(settings: WorkerSettings, each: Mapping[str, float]) -> None:
    """Check that all workers can be placed; if not, ask an autoscaler and wait `resource_timeout_s`.

    Args:
        settings: number of workers and the time to wait.
        each: resources of one worker, as `worker_resources` returns them.

    Raises:
        ClusterError: the resources are missing at the end of that time.
    """
    if max_placeable_workers(settings.workers, each) >= settings.workers:
        return
    if settings.resource_timeout_s:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[dict(each) for _ in range(settings.workers)])
        end = time.monotonic() + settings.resource_timeout_s
        while time.monotonic() < end:
            time.sleep(POLL_S)
            if max_placeable_workers(settings.workers, each) >= settings.workers:
                return
    size = ", ".join(f"{value:g} {kind}" for kind, value in each.items())
    raise ClusterError(
        f"{settings.workers} workers of {size} each do not fit: the cluster has "
        f"{available_resources() or 'nothing'}, which is enough for "
        f"{max_placeable_workers(settings.workers, each)} workers. "
        "Lower --workers or --cpus-per-worker, or raise --resource-timeout-s to wait for an autoscaler.",
        field="workers",
    )


def run_on_each_node(check: Callable[[], Any], each: Mapping[str, float]) -> list[Any]:
    """Run `check` on each node that could hold a worker.

    Args:
        check: function without arguments; Ray copies it to the nodes.
        each: resources of one worker, as `worker_resources` returns them.

    Returns:
        The results, one for each node.

    Raises:
        MTLSignError: the first one that `check` raised, with the name of its node.
    """
    nodes = [
        node
        for node in living_nodes()
        if all(node["Resources"].get(kind, 0) >= need for kind, need in each.items())
    ]
    remote = ray.remote(num_cpus=0, max_retries=1)(_returning_errors(check))
    calls = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    ]
    results = list(ray.get(calls))
    for result, node in zip(results, nodes, strict=True):
        if isinstance(result, MTLSignError):
            if len(nodes) > 1:
                result.detail = f"On node {node['NodeManagerHostname']}: {result.detail}"
                result.args = (f"{result.field}: {result.detail}" if result.field else result.detail,)
            raise result
    return results


def run_on_one_node(work: Callable[[], Any], resources: Mapping[str, float]) -> Any:
    """Run `work` once, on a node with the resources of a worker, and return its result.

    Args:
        work: function without arguments; Ray copies it to the node.
        resources: resources of one worker, as `worker_resources` returns them.

    Raises:
        MTLSignError: raised by `work`.
    """
    remote = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=1)
    result = ray.get(remote(_returning_errors(work)).remote())
    if isinstance(result, MTLSignError):
        raise result
    return result


def _returning_errors(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return `work` with this package's errors as results: Ray would wrap an exception and run it again."""

    def guarded() -> Any:
        try:
            return work()
        except MTLSignError as error:
            return error

    return guarded


def run_in_thread(work: Callable[[], Any]) -> Any:
    """Call `work` in another thread and return its result or raise its exception.

    In the main thread, Ray Train and Tune would install their own handlers for SIGINT.
    """
    result: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if errors:
        raise errors[0]
    return result[0]
