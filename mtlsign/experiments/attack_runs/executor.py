"""mtlsign.experiments.attack_runs.executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from mtlsign.attacks import (
    AttackDivergedError,
    AttackerResources,
    AttackPlan,
    NotApplicableError,
    parse_attacks,
)
from mtlsign.attacks.attacker_data import transform_task
from mtlsign.attacks.expressions import row_header
from mtlsign.config.embed import EmbedSettings
from mtlsign.experiments.attack_runs.results import COLUMNS, Row, compare_with_baseline
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.models.loading import cpu_state
from mtlsign.storage.model_folder import model_digest
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding import loop
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.detector import verify

StepCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class AttackResult:
    """One attack's row (without what needs the unattacked model) and the attacked model's bytes."""

    row: Row
    model: bytes | None = field(repr=False)


def run_attack(
    target: AttackTarget,
    order: AttackPlan,
    seed: int,
    device: torch.device | str = "cpu",
    tick: StepCallback | None = None,
) -> AttackResult:
    """Carry out one order. An attack that diverges, does not apply or fails is a row that says so."""
    row: Row = {**dict.fromkeys(COLUMNS), **row_header(order), "seed": seed, "status": "ok"}
    model, task = target.model(device), target.load_task().to(device)
    detector = detector_for_kit(target.kit, target.factory, device=device)
    budget = AttackerResources(
        target.extra,
        target.lr,
        detector,
        [parse_safetensors(c) for c in target.copies],
        tick or (lambda *_: None),
    )
    started = time.monotonic()
    try:
        attacked = order.run(model, task, budget, seed)
        tensors = cpu_state(attacked.model)
        if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
            raise AttackDivergedError("a weight is not finite")
    except AttackDivergedError as error:
        row |= {"status": "diverged", "reason": str(error)}
    except NotApplicableError as error:
        row |= {"status": "not_applicable", "reason": str(error)}
    except Exception as error:  # one attack's defect must not cost the others' rows
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    row["seconds"] = round(time.monotonic() - started, 3)
    if row["status"] != "ok":
        return AttackResult(row, None)
    verdict = attacked.verdict or verify(tensors, detector, bits=target.bits)
    data = serialize_safetensors(tensors)
    exact = EmbedSettings.of({"amp": False})
    after = loop.evaluate(
        attacked.model, transform_task(task, attacked.inputs), "test", exact, SingleProcessContext(device)
    )
    row |= {
        "wm_accuracy": verdict.accuracy, "evidence_bits": verdict.evidence_bits,
        "accepted": verdict.accepted, "verdict": verdict.status, "matches": verdict.matches, "n": verdict.n,
        "primary_after": after, "steps": attacked.steps, "images": attacked.images,
        "inputs": "+".join(attacked.inputs), "model_digest": model_digest(data), "reason": verdict.reason,
    }  # fmt: skip
    return AttackResult(row, data)


class AttackBackend(Protocol):
    """Where attacks run."""

    def preflight(self, target: AttackTarget) -> None:
        """See that the data are there, wherever they will be read."""

    def run_attacks(
        self, target: AttackTarget, orders: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """Carry out the orders; results as they come, in any order."""


class LocalAttackBackend:
    """One attack after the other in this process."""

    def __init__(self, tick: Callable[[AttackPlan, int, int], None] = lambda *_: None) -> None:
        self._tick = tick
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def preflight(self, target: AttackTarget) -> None:
        """Load the data here."""
        target.load_task()

    def run_attacks(
        self, target: AttackTarget, orders: Sequence[AttackPlan], seed: int
    ) -> Iterator[tuple[AttackPlan, AttackResult]]:
        """In the order given."""
        for order in orders:
            yield order, run_attack(target, order, seed, self._device, partial(self._tick, order))


def plans_with_baseline(text: str) -> list[AttackPlan]:
    """The orders with the unattacked model first: every row is compared with it."""
    first = parse_attacks("none")
    return [*first, *(order for order in parse_attacks(text) if order not in first)]


def run_all(
    target: AttackTarget,
    orders: Sequence[AttackPlan],
    seed: int,
    backend: AttackBackend,
    *,
    have: Iterable[Row] = (),
    keep: Callable[[Row, bytes | None], Row],
) -> list[Row]:
    """Rows of all orders, in their order. `have` are finished rows; `keep` gets each new one with its model
    at once and returns it as it was kept. All are compared with `none` again: `have` may be older than it.
    """
    done = {(row["attack"], row["setting"]): row for row in have}
    whole = next((row for row in done.values() if row["attack"] == "none"), None)
    left = [order for order in orders if (order.name, order.setting) not in done]
    for part in (left[:1], left[1:]) if whole is None else (left,):
        for order, struck in backend.run_attacks(target, part, seed):
            whole = struck.row if order.name == "none" else whole
            row = keep(compare_with_baseline(struck.row, whole, target.bits), struck.model)
            done[order.name, order.setting] = row
    return [compare_with_baseline(done[order.name, order.setting], whole, target.bits) for order in orders]
