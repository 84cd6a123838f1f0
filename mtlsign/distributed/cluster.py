"""Meeting a Ray cluster: attach or start one, wait for room, look at every node's data."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Read by Ray at import: no usage report, no second copy of workers' prints, quick detection of dead
# workers, workers that share this interpreter's environment instead of building one through `uv run`, and no
# second Ray started by a thread that still calls it while an interrupted process ends the first.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from mtlsign.config.embed import EmbedSettings  # noqa: E402
from mtlsign.errors import ClusterError, SettingsError  # noqa: E402


def cluster_address_set() -> bool:
    """Whether a cluster is already there to be joined (`ray job submit`, RAY_ADDRESS, or ray.init before)."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def require_owner(owner: Path | None) -> None:
    """On a cluster the identity must be named: one made there would die with the head node."""
    if owner is None and cluster_address_set():
        raise SettingsError(
            "is required on a cluster, whose disks do not last; make one with jobs/identity.py and pass it",
            field="owner",
        )


def check_local_cpus(settings: EmbedSettings) -> None:
    """Raise `ClusterError` before Ray starts where this machine alone has too few CPUs."""
    wanted, have = settings.workers * (settings.cpus_per_worker or 1), os.cpu_count() or 1
    if not cluster_address_set() and wanted > have:
        raise ClusterError(
            f"{settings.workers} workers need {wanted} CPUs and this machine has {have}; "
            "lower --workers or --cpus-per-worker, or join a cluster with RAY_ADDRESS",
            field="workers",
        )


def is_single_machine() -> bool:
    """Whether every node that is alive runs on the machine of this process."""
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return all(n["NodeManagerAddress"] == here for n in ray.nodes() if n["Alive"])  # type: ignore[no-untyped-call]


def connect() -> None:
    """Join the cluster that is there, or start one on this machine. Raises `ClusterError`.

    A cluster started here ends with this process.
    """
    if ray.is_initialized():
        return
    paths = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    # Whatever log_to_driver says, Ray prints lost workers to standard output, where --json has its document.
    # They stay in Ray's logs, and Train reports them.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **quiet)
        else:
            # One process less to start: nobody takes a node of this machine away.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            cpus = os.cpu_count() or 1
            # "local": else Ray joins whatever cluster somebody's `ray start` left on this machine.
            ray.init(
                address="local", num_cpus=max(cpus, 1), include_dashboard=True, dashboard_port=0,
                runtime_env=environment,
                object_store_memory=max(256 * 2**20, min(2 * 2**30, _memory() // 5)), **quiet,
            )  # fmt: skip
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot be reached or started ({str(error).splitlines()[0][:200]}); check RAY_ADDRESS",
            field="ray",
        ) from None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resources(settings: EmbedSettings) -> dict[str, float]:
    """What one worker reserves: CPUs (by default an even share of this machine; one on a cluster), GPUs."""
    cpus = settings.cpus_per_worker
    if cpus is None:
        nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        total = int(sum(n["Resources"].get("CPU", 0) for n in nodes))
        cpus = max(1, total // max(1, settings.workers)) if len(nodes) == 1 else 1
    return {
        "CPU": float(cpus),
        **({"GPU": float(settings.gpus_per_worker)} if settings.gpus_per_worker else {}),
    }


def max_placeable_workers(workers: int, each: Mapping[str, float]) -> int:
    """How many such workers the nodes that are alive could hold when idle, at most `workers`."""
    fits = 0
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            fits += min(int(node["Resources"].get(kind, 0) // need) for kind, need in each.items() if need)
    return min(fits, workers)


def wait_for_resources(settings: EmbedSettings, each: Mapping[str, float]) -> None:
    """Check that the workers can be placed; ask an autoscaler and wait `cluster_wait` seconds if they cannot.

    Raises:
        ClusterError: there is no room, and none comes.
    """
    if max_placeable_workers(settings.workers, each) >= settings.workers:
        return
    wanted = ", ".join(f"{value:g} {kind}" for kind, value in each.items())
    if settings.cluster_wait:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[dict(each) for _ in range(settings.workers)])
        end = time.monotonic() + settings.cluster_wait
        while time.monotonic() < end:
            time.sleep(2)
            if max_placeable_workers(settings.workers, each) >= settings.workers:
                return
    have = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}  # type: ignore[no-untyped-call]
    raise ClusterError(
        f"{settings.workers} of {wanted} each do not fit: the cluster has {have or 'nothing'} and room for "
        f"{max_placeable_workers(settings.workers, each)}; lower --workers or --cpus-per-worker, "
        "or raise --cluster-wait for an autoscaler",
        field="workers",
    )


def run_on_each_node(check: Callable[[], Any], each: Mapping[str, float]) -> list[Any]:
    """Run `check` on each node that could hold a worker; its results, or the first `MTLSignError`."""
    from mtlsign.errors import MTLSignError

    def guarded() -> Any:
        try:
            return check()
        except MTLSignError as error:
            return error

    nodes = [
        n
        for n in ray.nodes()  # type: ignore[no-untyped-call]
        if n["Alive"] and all(n["Resources"].get(kind, 0) >= need for kind, need in each.items())
    ]
    remote = ray.remote(num_cpus=0, max_retries=1)(guarded)
    calls = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
        for n in nodes
    ]
    results = ray.get(calls)
    for result, node in zip(results, nodes, strict=True):
        if isinstance(result, MTLSignError):
            if len(nodes) > 1:
                raise type(result)(f"on node {node['NodeManagerHostname']}: {result}")
            raise result
    return list(results)


def run_in_thread(work: Callable[[], Any]) -> Any:
    """Call `work` in another thread: in the main one Ray Train and Tune take SIGINT for themselves."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.extend((None, work()))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
    if outcome[0] is not None:
        raise outcome[0]
    return outcome[1]
