"""Attack backend on Ray: each attack is one task, and at most `workers` of them run at a time.

The target holds the opened key. It travels as an object that workers fetch, never as an argument, because
Ray's dashboard shows arguments. Ray keeps worker processes warm, so they load the task's data once. Losing a
worker or a node costs only the time of its attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtlsign.distributed import cluster

# ruff: isort: split
import ray
import torch

from mtlsign.attacks import AttackPlan, parse_attacks
from mtlsign.config.attack import AttackSettings
from mtlsign.errors import ClusterError, MTLSignError
from mtlsign.experiments.attack_runs.executor import AttackResult, run_attack
from mtlsign.experiments.attack_runs.run import LogCallback, RowCallback, run_attack_job
from mtlsign.experiments.attack_runs.target import AttackTarget

#: Called while attacks run, with the running plans and the number of plans that have not started.
WaitingCallback = Callable[[Sequence[AttackPlan], int], None]
_MAX_RETRIES = 2


def attack_on_ray(
    settings: AttackSettings,
    *,
    on_progress: RowCallback = lambda *_: None,
    log: LogCallback = lambda _: None,
    on_waiting: WaitingCallback = lambda *_: None,
) -> dict[str, Any]:
    """Run the attack job on Ray: join or start a cluster and execute the attacks there.

    Args:
        settings: the settings of the job.
        on_progress: called with each finished row, its number and the number of rows.
        log: called with lines for the terminal.
        on_waiting: called while attacks run.

    Returns:
        The content of ``result.json``.

    Raises:
        MTLSignError: an input is invalid, resources are missing, or an attack lost its worker too often.
    """
    if settings.kit_passphrase_file is None:
        cluster.require_owner(settings.owner)
    cluster.check_local_cpus(settings)
    return run_attack_job(settings, RayAttackBackend(settings, on_waiting), on_progress=on_progress, log=log)


class RayAttackBackend:
    """Attack backend that runs attacks as Ray tasks."""

    def __init__(self, settings: AttackSettings, on_waiting: WaitingCallback = lambda *_: None) -> None:
        self._settings, self._on_waiting = settings, on_waiting
        self._resources: dict[str, float] = {}

    def preflight(self, target: AttackTarget) -> None:
        """Connect, check the resources, and load the data on every node that could run an attack."""
        cluster.connect()
        self._resources = cluster.worker_resources(self._settings)
        cluster.wait_for_resources(self._settings, self._resources)
        secret = ray.put(target)
        cluster.run_on_each_node(lambda: ray.get(secret).load_data(), self._resources)

    def run_attacks(
        self, target: AttackTarget, plans: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """Run the plans; yield results as they are finished.

        Args:
            target: the marked model with its kit and task.
            plans: the plans.
            seed: seed of the attackers' random choices.

        Raises:
            ClusterError: an attack lost its worker more often than it may be retried.
        """
        cpus, gpus = self._resources["CPU"], self._resources.get("GPU", 0)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_MAX_RETRIES)(_run_attack_on_worker)
        secret, threads = [ray.put(target)], max(1, int(cpus))
        remaining = list(reversed(plans))
        running: dict[Any, AttackPlan] = {}
        try:
            while remaining or running:
                while remaining and len(running) < self._settings.workers:
                    plan = remaining.pop()
                    call = task.options(name=f"attack {plan.name}").remote(secret, plan.text(), seed, threads)
                    running[call] = plan
                ready, _ = ray.wait(list(running), timeout=0.5)
                if not ready:
                    self._on_waiting(list(running.values()), len(remaining))
                for call in ready:
                    yield running[call], _result_of(call, running[call])
                    del running[call]
        finally:  # interrupted or failed: the other attacks must not continue unnoticed
            for call in running:
                ray.cancel(call, force=True)


def _run_attack_on_worker(
    secret: list[Any], text: str, seed: int, threads: int
) -> AttackResult | MTLSignError:
    """Run one attack; return an invalid input as a value, because Ray would retry a task that raises."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    try:
        return run_attack(ray.get(secret[0]), parse_attacks(text)[0], seed, device)
    except MTLSignError as error:
        return error


def _result_of(call: Any, plan: AttackPlan) -> AttackResult:
    try:
        result = ray.get(call)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1][:300]
        raise ClusterError(
            f"The worker of {plan.name!r} was lost too often ({cause}). Remove the cause, then continue with "
            "--resume.",
            field="attack",
        ) from error
    if isinstance(result, MTLSignError):
        raise result
    assert isinstance(result, AttackResult)
    return result
