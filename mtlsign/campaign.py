"""An attack run: one marked model, many attacks, a row for each.

`open_campaign` reads and checks everything before anything is written; `run` carries the orders out in the
places that a `Crew` offers (`InTurn` is this process, `mtlsign.distributed.attack.RayCrew` is Ray) and keeps
every row as it comes, so that an interrupted run loses nothing that was finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mtlsign import backbone, training
from mtlsign.artifact import Kit, LoadedModel, model_digest, read_model
from mtlsign.attacks import AttackDivergedError, Budget, NotApplicableError, Order, parse
from mtlsign.attacks.data import through
from mtlsign.attacks.orders import as_mapping
from mtlsign.errors import DataError, ModelError, SettingsError
from mtlsign.kits import open_kit, probe_of
from mtlsign.network import cpu_state
from mtlsign.progress import Alone
from mtlsign.settings import EmbedSettings
from mtlsign.settings_attack import AttackSettings
from mtlsign.tasks import Task, load_task
from mtlsign.tensors import read_tensors, tensor_bytes
from mtlsign.verification import verify

Row = dict[str, Any]
Tick = Callable[[int, int], None]

#: The field's success rule (Watermark-Robustness-Toolbox): mark rejected and at most so many points lost.
POINTS = 5.0

#: Columns of `attacks.csv`, in order.
COLUMNS = (
    "attack", "setting", "seed", "kind", "status", "wm_accuracy", "evidence_bits", "accepted", "verdict",
    "primary_before", "primary_after", "points_lost", "removed", "matches", "n", "steps", "images", "seconds",
    "inputs", "model_digest", "model", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """All that a process needs to attack one model. It holds the opened key: SECRET, never shown."""

    tensors: bytes = field(repr=False)
    kit: Kit = field(repr=False)
    graph: Mapping[str, object]
    factory: str | None
    task: str
    data: Path | None
    download: bool
    split_seed: int
    extra: float
    lr: float
    copies: tuple[bytes, ...] = field(repr=False)
    bits: float

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The marked network. Raises `ModelError` where its tensors are not the architecture's."""
        arch = str(self.graph["arch"])
        factories = {self.factory: backbone.load_factory(self.factory)} if self.factory else {}
        if arch.startswith("own/") and arch[4:] not in factories:
            raise ModelError(
                f"is of an own architecture; if you trust that code: --factory {arch[4:]}", field="factory"
            )
        network = backbone.build(self.graph, factories=factories)
        try:
            network.load_state_dict(read_tensors(self.tensors))
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            raise ModelError(
                f"is not the architecture that its config names ({detail}); give the marked model itself",
                field="model",
            ) from None
        return network.to(device).to(memory_format=torch.channels_last).eval()

    def load_task(self) -> Task:
        """The primary task with the splits of the embedding. Raises `DataError`."""
        task = _task(self.task, self.data, self.download, self.split_seed)
        for name in ("channels", "classes"):
            if self.graph.get(name, getattr(task, name)) != getattr(task, name):
                raise DataError(
                    f"has {getattr(task, name)} {name}, the model {self.graph[name]}; name the model's own",
                    field="task",
                )
        return task


@lru_cache(maxsize=1)  # warm processes attack again and again
def _task(name: str, data: Path | None, download: bool, seed: int) -> Task:
    return load_task(name, data=data, download=download, seed=seed)


def target_of(s: AttackSettings) -> Target:
    """Read the model, the kit, the copies and their task; check that they belong together.

    Raises:
        MTLSignError: anything that is missing, damaged, not trusted, or does not fit.
    """
    for name in ("model", "kit"):
        if getattr(s, name) is None:
            raise SettingsError("is required; --attacks list needs none", field=name)
    kit = open_kit(s, str(s.kit))
    model = read_model(str(s.model), endpoint=s.endpoint)
    graph = model.config.get("graph")
    graph = graph if isinstance(graph, dict) else kit.opening.parse().graph
    task = s.task or _task_of(model, kit)
    places = [p.strip() for p in (s.copies or "").split(",") if p.strip()]
    copies = tuple(tensor_bytes(read_model(place, endpoint=s.endpoint).tensors) for place in places)
    seed = kit.info.get("seed")
    return Target(
        tensors=tensor_bytes(model.tensors),
        kit=kit,
        graph=graph,
        factory=s.factory,
        task=task,
        data=s.data,
        download=s.download,
        split_seed=s.split_seed if s.split_seed is not None else seed if isinstance(seed, int) else 0,
        extra=s.budget,
        lr=s.lr or _trained_at(kit, task, graph),
        copies=copies,
        bits=s.bits,
    )


def _task_of(model: LoadedModel, kit: Kit) -> str:
    """The task that the model or the kit names, unless it is code: that needs the caller's word."""
    named = model.config.get("task", kit.info.get("task"))
    if not isinstance(named, str) or not 0 < len(named) <= 200 or named == "own":
        raise DataError("is not named by the model; give --task", field="task")
    if ":" in named:
        raise DataError(f"is code; if you trust it: --task {named[:120]}", field="task")
    return named


def _trained_at(kit: Kit, task: str, graph: Mapping[str, object]) -> float:
    """Phase 1's peak rate: as the kit says, else the default for the task and width."""
    known = kit.info.get("lr")
    if isinstance(known, float) and 0 < known <= 100:
        return known
    width = graph.get("width")
    given = {"task": task} | ({"width": width} if isinstance(width, int) else {})
    return EmbedSettings.of(given).resolved().lr or 0.1


# -- one attack --------------------------------


@dataclass(frozen=True)
class Struck:
    """One attack's row (without what needs the unattacked model) and the attacked model's bytes."""

    row: Row
    model: bytes | None = field(repr=False)


def strike(
    target: Target, order: Order, seed: int, device: torch.device | str = "cpu", tick: Tick | None = None
) -> Struck:
    """Carry out one order. An attack that diverges, does not apply or fails is a row that says so."""
    row: Row = {**dict.fromkeys(COLUMNS), **as_mapping(order), "seed": seed, "status": "ok"}
    model, task = target.model(device), target.load_task().to(device)
    probe = probe_of(target.kit, target.factory, device=device)
    budget = Budget(
        target.extra, target.lr, probe, [read_tensors(c) for c in target.copies], tick or (lambda *_: None)
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
        return Struck(row, None)
    verdict = attacked.verdict or verify(tensors, probe, bits=target.bits)
    data = tensor_bytes(tensors)
    exact = EmbedSettings.of({"amp": False})
    after = training.evaluate(attacked.model, through(task, attacked.inputs), "test", exact, Alone(device))
    row |= {
        "wm_accuracy": verdict.accuracy, "evidence_bits": verdict.evidence_bits,
        "accepted": verdict.accepted, "verdict": verdict.status, "matches": verdict.matches, "n": verdict.n,
        "primary_after": after, "steps": attacked.steps, "images": attacked.images,
        "inputs": "+".join(attacked.inputs), "model_digest": model_digest(data), "reason": verdict.reason,
    }  # fmt: skip
    return Struck(row, data)


def compared(row: Row, whole: Row | None, bits: float) -> Row:
    """The row beside the unattacked model's: points lost, and whether the field would call the mark removed.

    `removed` is None for forgeries, for rows without a model, where the unattacked model did not carry the
    mark either, and where the mark could not be read at all, which never counts as removed.
    """
    after, before = row["primary_after"], (whole or {}).get("primary_after")
    row = row | {"primary_before": before}
    if whole is None or before is None or after is None or not math.isfinite(after):
        return row
    row["points_lost"] = round(100 * (before - after), 4)
    readable = row["kind"] in ("removal", "free") and row["verdict"] != "not_verifiable"
    if readable and whole["evidence_bits"] >= bits:
        row["removed"] = bool(row["evidence_bits"] < bits and row["points_lost"] <= POINTS)
    return row


# -- many attacks --------------------------------


class Crew(Protocol):
    """Where attacks run."""

    def check(self, target: Target) -> None:
        """See that the data are there, wherever they will be read."""

    def strikes(self, target: Target, orders: Sequence[Order], seed: int) -> Iterator[tuple[Order, Struck]]:
        """Carry out the orders; results as they come, in any order."""


class InTurn:
    """One attack after the other in this process."""

    def __init__(self, tick: Callable[[Order, int, int], None] = lambda *_: None) -> None:
        self._tick = tick
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def check(self, target: Target) -> None:
        """Load the data here."""
        target.load_task()

    def strikes(self, target: Target, orders: Sequence[Order], seed: int) -> Iterator[tuple[Order, Struck]]:
        """In the order given."""
        for order in orders:
            yield order, strike(target, order, seed, self._device, partial(self._tick, order))


def orders_of(text: str) -> list[Order]:
    """The orders with the unattacked model first: every row is compared with it."""
    first = parse("none")
    return [*first, *(order for order in parse(text) if order not in first)]


def carry_out(
    target: Target,
    orders: Sequence[Order],
    seed: int,
    crew: Crew,
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
        for order, struck in crew.strikes(target, part, seed):
            whole = struck.row if order.name == "none" else whole
            row = keep(compared(struck.row, whole, target.bits), struck.model)
            done[order.name, order.setting] = row
    return [compared(done[order.name, order.setting], whole, target.bits) for order in orders]


def state_of(row: Row) -> str:
    """A finished row in one line, for a person."""
    name = f"{row['attack']} {row['setting']}".strip()
    if row["status"] != "ok":
        return f"{name} · {row['status'].replace('_', ' ')}: {row['reason']} · {row['seconds']:.1f} s"
    if row["verdict"] == "not_verifiable":
        found = f"not verifiable: {row['reason']}"
    else:
        found = f"{row['matches']:,} of {row['n']:,} bits agree, evidence {row['evidence_bits']:.1f} bits"
    lost = "" if row["points_lost"] is None else f", {row['points_lost']:+.2f} points lost"
    return f"{name} · {found}{lost} · {row['seconds']:.1f} s" + (" · MARK REMOVED" if row["removed"] else "")


def summary_counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many attacks ended how."""
    ran = [row for row in rows if row["status"] == "ok" and row["kind"] in ("removal", "free")]
    return {
        "marked": sum(
            row["kind"] == "none" and row["verdict"] in ("accepted", "needs_commitment") for row in rows
        ),
        "attacks": len([row for row in rows if row["kind"] != "none"]),
        "removed": sum(row["removed"] is True for row in ran),
        "rejected": sum(row["verdict"] == "rejected" for row in ran),
        **{name: sum(row["status"] == name for row in rows)
           for name in ("diverged", "not_applicable", "failed")},
    }  # fmt: skip
