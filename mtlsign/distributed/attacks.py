"""Attacks over Ray: each is one task, at most `workers` of them at a time.

The target (with the opened key) travels as an object that workers fetch, never as an argument that Ray would
show. Warm workers keep the task's data between attacks. A lost worker or node costs its attacks' time only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtlsign.distributed import cluster

# ruff: isort: split
import ray
import torch

from mtlsign.attacks import AttackPlan
from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ClusterError, MTLSignError
from mtlsign.experiments.attack_runs import run
from mtlsign.experiments.attack_runs.executor import AttackResult, run_attack
from mtlsign.experiments.attack_runs.target import AttackTarget

#: Called while attacks run, with those that do and how many still wait.
Waiting = Callable[[Sequence[AttackPlan], int], None]


def attack_on_ray(
    settings: AttackSettings,
    *,
    show: run.Show = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    waiting: Waiting = lambda *_: None,
) -> dict[str, Any]:
    """The attack job on Ray: join or start a cluster, run `attack_run.run` there.

    Raises:
        MTLSignError: bad input, no room, or an attack whose workers were lost past their retries.
    """
    if settings.kit_passphrase_file is None:
        cluster.require_owner(settings.owner)
    cluster.check_local_cpus(_placed(settings))
    return run.run(settings, RayAttackBackend(settings, waiting), show=show, say=say)


def _placed(settings: AttackSettings) -> EmbedSettings:
    """The settings that say how many workers of what size, as `cluster` reads them."""
    names = ("workers", "cpus_per_worker", "gpus_per_worker", "cluster_wait")
    return EmbedSettings.of({name: getattr(settings, name) for name in names})


class RayAttackBackend:
    """Attacks as Ray tasks."""

    def __init__(self, settings: AttackSettings, waiting: Waiting = lambda *_: None) -> None:
        self._placed, self._waiting = _placed(settings), waiting
        self._each: dict[str, float] = {}

    def preflight(self, target: AttackTarget) -> None:
        """Connect, check that there is room, and load the data on every node that may hold an attack."""
        cluster.connect()
        self._each = cluster.resources(self._placed)
        cluster.wait_for_resources(self._placed, self._each)
        secret = ray.put(target)
        cluster.run_on_each_node(lambda: len(ray.get(secret).load_task().splits), self._each)

    def run_attacks(
        self, target: AttackTarget, orders: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """Results as they come. Raises `ClusterError` when an attack's worker is lost past its retries."""
        secret, threads = [ray.put(target)], max(1, int(self._each["CPU"]))
        gpus = self._each.get("GPU", 0)
        task = ray.remote(num_cpus=self._each["CPU"], num_gpus=gpus, max_retries=2)(_strike)
        left = list(reversed(orders))
        running: dict[Any, AttackPlan] = {}
        try:
            while left or running:
                while left and len(running) < self._placed.workers:
                    order = left.pop()
                    named = task.options(name=f"attack {order.name}")
                    running[named.remote(secret, order.text(), seed, threads)] = order
                ready, _ = ray.wait(list(running), timeout=0.5)
                if not ready:
                    self._waiting(list(running.values()), len(left))
                for call in ready:
                    yield running[call], _outcome(call, running[call])
                    del running[call]
        finally:  # interrupted, or one failed: nothing goes on behind the user's back
            for call in running:
                ray.cancel(call, force=True)


def _strike(secret: list[Any], text: str, seed: int, threads: int) -> AttackResult | MTLSignError:
    """One attack on a worker; bad input comes back as a value, since trying again would not help."""
    from mtlsign.attacks import parse_attacks

    torch.set_num_threads(threads)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    try:
        return run_attack(ray.get(secret[0]), parse_attacks(text)[0], seed, device)
    except MTLSignError as error:
        return error


def _outcome(call: Any, order: AttackPlan) -> AttackResult:
    try:
        result = ray.get(call)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1][:300]
        raise ClusterError(
            f"{order.name} was lost past its retries ({cause}); mend that, then --resume", field="attack"
        ) from error
    if isinstance(result, MTLSignError):
        raise result
    assert isinstance(result, AttackResult)
    return result
