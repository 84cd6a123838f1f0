"""Execution of attacks: one plan becomes one row and one attacked model, in this process or on a backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from mtlsign.attacks import (
    AttackDivergedError,
    AttackerResources,
    AttackOutcome,
    AttackPlan,
    NotApplicableError,
    parse_attacks,
)
from mtlsign.attacks.attacker_data import TransformedModel, transform_task
from mtlsign.attacks.expressions import row_header
from mtlsign.config.embed import EmbedSettings
from mtlsign.experiments.attack_runs.results import COLUMNS, Row, compare_with_baseline
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.models.loading import cpu_state
from mtlsign.schemes.base import Detection, WatermarkScheme
from mtlsign.storage.model_folder import model_digest
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import loop
from mtlsign.watermark.embedding.worker import SingleProcessContext

StepCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class AttackResult:
    """Result of one attack: its row, not yet compared with the unattacked model, and the attacked model."""

    row: Row
    model: bytes | None = field(repr=False)


def run_attack(
    target: AttackTarget,
    plan: AttackPlan,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: StepCallback | None = None,
) -> AttackResult:
    """Run one attack. An attack that diverges, does not apply or fails becomes a row with that status.

    Args:
        target: the marked model with its kit and task.
        plan: the attack.
        seed: seed of the attacker's random choices.
        device: where to train.
        on_step: called with (step, steps) while the attack trains.
    """
    row: Row = {**dict.fromkeys(COLUMNS), **row_header(plan), "seed": seed, "status": "ok"}
    model, task = target.model(device), target.load_task().to(device)
    scheme, key = target.watermark(device)
    resources = AttackerResources(
        extra_data_fraction=target.extra_data_fraction,
        training_lr=target.learning_rate,
        training_optimizer=target.optimizer,
        key=key,
        other_models=[parse_safetensors(data) for data in target.other_marked_models],
        public_base=None if target.public_base is None else parse_safetensors(target.public_base),
        transfer_task=target.load_transfer_task(),
        on_step=on_step or (lambda *_: None),
        scheme=scheme,
    )
    outcome: AttackOutcome | None = None
    started = time.monotonic()
    try:
        outcome = plan.run(model, task, resources, seed)
        _require_finite(outcome)
    except AttackDivergedError as error:
        row |= {"status": "diverged", "reason": str(error)}
    except NotApplicableError as error:
        row |= {"status": "not_applicable", "reason": str(error)}
    except Exception as error:  # a bug in one attack must not abort the remaining attacks
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    row["seconds"] = round(time.monotonic() - started, 3)
    if row["status"] != "ok" or outcome is None:
        return AttackResult(row, None)
    detection = outcome.detection or _detect(scheme, key, outcome)
    return _measure(row, outcome, task, detection, device)


def _detect(scheme: WatermarkScheme[Any], key: Any, outcome: AttackOutcome) -> Detection:
    """Verify the attacked model. A black-box query passes through the changes that its operator applies."""
    model = outcome.model
    if scheme.access == "black-box" and outcome.input_transforms:
        model = TransformedModel(model, outcome.input_transforms).eval()
    return scheme.verify(model, key, outcome.tensors)


def _require_finite(outcome: AttackOutcome) -> None:
    tensors = outcome.model.state_dict().values()
    if not all(torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
        raise AttackDivergedError("a weight is not finite")


def _measure(
    row: Row,
    outcome: AttackOutcome,
    task: Task,
    detection: Detection,
    device: torch.device | str,
) -> AttackResult:
    """Add the detection and the accuracy on the test split to the row.

    A model of another task has no accuracy on the owner's. The reason then states that on its task.
    """
    data = serialize_safetensors(cpu_state(outcome.model) if outcome.tensors is None else outcome.tensors)
    exact = EmbedSettings.of({"amp": False})
    evaluated = outcome.task or transform_task(task, outcome.input_transforms)
    metric = loop.evaluate(outcome.model, evaluated, "test", exact, SingleProcessContext(device))
    after, reason = metric if outcome.task is None else None, detection.reason
    if outcome.task is not None:
        other = f"The model has another task of {evaluated.classes} classes, with a metric of {metric:.3f}."
        reason = f"{reason} {other}" if reason else other
    row = row | {
        "wm_accuracy": detection.accuracy, "evidence_bits": detection.evidence_bits,
        "accepted": detection.accepted, "verdict": detection.status, "matches": detection.matched,
        "n": detection.n, "null_rate": detection.null_rate,
        "primary_after": after, "steps": outcome.steps, "images": outcome.images,
        "inputs": "+".join(map(str, outcome.input_transforms)), "model_digest": model_digest(data),
        "reason": reason,
    }  # fmt: skip
    return AttackResult(row, data)


class AttackBackend(Protocol):
    """Executor of attacks. `mtlsign.distributed.attacks` has the implementation on Ray."""

    def preflight(self, target: AttackTarget) -> None:
        """Check that the data are available in every process that will read them."""

    def run_attacks(
        self, target: AttackTarget, plans: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """Run the plans; yield results as they are finished, in any order."""


class LocalAttackBackend:
    """Attack backend of this process: one attack after the other."""

    def __init__(self, on_step: Callable[[AttackPlan, int, int], None] = lambda *_: None) -> None:
        self._on_step = on_step
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def preflight(self, target: AttackTarget) -> None:
        """Load the data."""
        target.load_data()

    def run_attacks(
        self, target: AttackTarget, plans: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """Run the plans in their order."""
        for plan in plans:
            yield plan, run_attack(target, plan, seed, self._device, partial(self._on_step, plan))


def plans_with_baseline(text: str) -> list[AttackPlan]:
    """Parse attack expressions; the plan of the unattacked model comes first, as every row needs its row."""
    baseline = parse_attacks("none")
    return [*baseline, *(plan for plan in parse_attacks(text) if plan not in baseline)]


def run_all(
    target: AttackTarget,
    plans: Sequence[AttackPlan],
    seed: int,
    backend: AttackBackend,
    *,
    finished_rows: Iterable[Row] = (),
    store_row: Callable[[Row, bytes | None], Row],
) -> list[Row]:
    """Run all plans that have no finished row yet.

    Args:
        target: the marked model with its kit and task.
        plans: the plans, the unattacked model (`none`) first.
        seed: seed of the attackers' random choices.
        backend: executor of the attacks.
        finished_rows: rows of an earlier, interrupted call. They are compared with the unattacked model
            again, because its row may be newer.
        store_row: called with each new row and its attacked model as soon as it is finished; returns the row
            as it was stored.

    Returns:
        The rows of all plans, in the order of `plans`.
    """
    rows = {(row["attack"], row["parameters"]): row for row in finished_rows}
    baseline = next((row for row in rows.values() if row["attack"] == "none"), None)
    remaining = [plan for plan in plans if (plan.name, plan.parameters) not in rows]
    for part in (remaining[:1], remaining[1:]) if baseline is None else (remaining,):
        for plan, result in backend.run_attacks(target, part, seed):
            baseline = result.row if plan.name == "none" else baseline
            row = compare_with_baseline(result.row, baseline, target.min_evidence_bits)
            rows[plan.name, plan.parameters] = store_row(row, result.model)
    return [
        compare_with_baseline(rows[plan.name, plan.parameters], baseline, target.min_evidence_bits)
        for plan in plans
    ]
