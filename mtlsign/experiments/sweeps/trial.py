"""A sweep's cells: one phase 1 for all that share it, then for each cell phase 2, attacks and one row.

Nothing here knows Ray: `mtlsign.distributed.tune` runs `train_shared` and `run_cell` in Ray Tune's processes,
a notebook may call them itself. What a cell finishes lies in its own `result.json`, from which its row can be
rebuilt, so a sweep that was killed loses no finished cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mtlsign.attacks import AttackPlan, parse_attacks
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError, DivergedError, ModelError
from mtlsign.experiments.attack_runs.executor import run_attack
from mtlsign.experiments.attack_runs.results import compare_with_baseline
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.models import architectures
from mtlsign.models.loading import (
    InputSpec,
    architecture_from_settings,
    custom_factories,
    load_initial_weights,
)
from mtlsign.storage.base import Storage
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.result import parameter_deviation
from mtlsign.watermark.embedding.run_folder import load_state, state_bytes
from mtlsign.watermark.embedding.worker import SingleProcessContext, State
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import OwnerKit
from mtlsign.watermark.verification.detector import WatermarkDetector, verify

Row = dict[str, Any]
Show = Callable[[Mapping[str, Any]], None]

RESULT, STATE, ATTACK_RESULTS_FILE, CELLS, CLEAN = "result.json", "state.pt", "attacks.json", "cells", "clean"
#: Columns of `cells.csv`, before one pair (bits, points lost) for each attack.
COLUMNS = (
    "cell", "lambda1", "lambda2", "seed", "status", "primary_clean", "primary_marked", "validation_clean",
    "validation_marked", "drop_points", "wm_accuracy", "evidence_bits", "evidence_bits_attacked",
    "deviation_l2", "wm_accuracy_on_clean", "seconds_mark", "seconds_attacks", "reason",
)  # fmt: skip
_LIMIT = 2**20


@dataclass(frozen=True)
class SharedTrialData:
    """What every cell is given. It holds W0: SECRET, never shown."""

    folder: Storage = field(repr=False)
    clean: Mapping[str, bytes] = field(repr=False)
    attacks: str
    bits: float
    data: Path | None
    download: bool

    def cell(self, config: Mapping[str, Any]) -> Cell:
        """The cell of one of Tune's configurations."""
        return Cell(config, self.data, self.download)


@lru_cache(maxsize=1)  # warm processes run cell after cell
def _task(name: str, data: Path | None, download: bool, seed: int) -> Task:
    return load_task(name, data=data, download=download, seed=seed)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checkpoint_writer(folder: Storage, name: str) -> Callable[[State], None]:
    def keep(state: State) -> None:
        folder.write(name, state_bytes(state))

    return keep


def train_shared_clean_model(cell: Cell, folder: Storage, show: Show | None = None) -> bytes:
    """Phase 1 of all cells with this `clean_name`, resumed if it was begun: W0's safetensors bytes."""
    kept = folder.child(CLEAN)
    name, state = f"{cell.clean_name}.safetensors", f"{cell.clean_name}.pt"
    if kept.exists(name):
        return kept.read(name, 2**32)
    s = cell.settings
    task = _task(s.task, s.data, s.download, s.seed)
    graph = architecture_from_settings(s, InputSpec(task.channels, task.height, task.width, task.classes))
    if s.init is not None:
        base_weights = load_initial_weights(s, graph)
    else:
        rank = SingleProcessContext(
            _device(), show=show, keep=checkpoint_writer(kept, state),
            state=load_state(kept.read(state, 2**34)) if kept.exists(state) else None,
        )  # fmt: skip
        base_weights, _ = pipeline.run_phase1(s, graph, rank)
    data = serialize_safetensors(base_weights)
    kept.write(name, data)
    kept.delete(state)
    return data


def run_cell(cell: Cell, shared: SharedTrialData, show: Show | None = None) -> Row:
    """Phase 2, then every attack: the cell's row, which is kept before it is returned.

    A cell that is finished returns its kept row at once; one that was interrupted goes on from its last
    checkpoint and after its last attack. A cell whose training diverges is a row that says so. One of whose
    attacks failed is a row too, but not finished: the next call tries that attack again.
    """
    kept = shared.folder.child(CELLS).child(cell.name)
    if (row := load_finished_row(kept)) is not None:
        return row
    row = empty_row(cell, "ok")
    try:
        row |= _run_phase2_and_attacks(cell.settings, cell, shared, kept, show)
        if row["status"] == "failed":
            return row
    except ModelError as error:
        row |= {"status": "diverged" if isinstance(error, DivergedError) else "failed", "reason": str(error)}
    kept.write(RESULT, json.dumps(row, allow_nan=False).encode())
    kept.delete(STATE)
    kept.delete(ATTACK_RESULTS_FILE)
    return row


def empty_row(cell: Cell, status: str, reason: str | None = None) -> Row:
    """A row with the cell's settings, and nothing measured yet."""
    s = cell.settings
    row = dict.fromkeys(COLUMNS) | {"cell": cell.name, "status": status, "reason": reason}
    row |= {name: getattr(s, name) for name in ("lambda1", "lambda2", "seed")}
    return row | {name: value for name, value in cell.flat.items() if name not in row}


def _run_phase2_and_attacks(
    settings: EmbedSettings, cell: Cell, shared: SharedTrialData, kept: Storage, show: Show | None
) -> Row:
    task, device = _task(settings.task, settings.data, settings.download, settings.seed), _device()
    graph = architecture_from_settings(
        settings, InputSpec(task.channels, task.height, task.width, task.classes)
    )
    base_weights = parse_safetensors(shared.clean[cell.clean_name])
    factories = custom_factories(graph)
    # A key for nobody: a sweep chooses settings, and whoever embeds with them has a key of their own.
    owner = Identity(hashlib.sha256(f"mtlsign sweep {settings.seed}".encode()).digest(), bytes(32))
    skeleton = architectures.build(graph, factories=factories)
    geometry = (task.channels, task.height, task.width)
    opening, reference = pipeline.commit_key(skeleton, base_weights, graph, geometry, settings, owner)
    rank = SingleProcessContext(
        device, show=show, keep=checkpoint_writer(kept, STATE),
        state=load_state(kept.read(STATE, 2**34)) if kept.exists(STATE) else None,
    )  # fmt: skip
    marked = pipeline.run_phase2(settings, base_weights, opening, reference, rank)
    detector = WatermarkDetector(opening, reference, head=marked.head, factories=factories)
    verdict = verify(marked.tensors, detector, bits=shared.bits, base_weights=base_weights)
    row: Row = {
        **{name: marked.measured[name] for name in _MEASURED},
        "drop_points": 100 * (marked.measured["validation_clean"] - marked.measured["validation_marked"]),
        "wm_accuracy": verdict.accuracy, "evidence_bits": verdict.evidence_bits,
        "wm_accuracy_on_clean": verdict.controls.get("w0", [None])[0],
        "deviation_l2": math.sqrt(sum(d * d for d in parameter_deviation(base_weights, marked.tensors).values())),
        "seconds_mark": round(sum(r["seconds"] for r in marked.rows), 3),
    }  # fmt: skip
    started, left = time.monotonic(), [verdict.evidence_bits]
    failed: list[str] = []
    other: list[str] = []
    kit = OwnerKit(opening, reference.data, b"", marked.head, {})
    target = AttackTarget(
        tensors=serialize_safetensors(marked.tensors), kit=kit, graph=graph,
        factory=str(graph["arch"])[4:] if factories else None, task=settings.task, data=settings.data, download=settings.download,
        split_seed=settings.seed, extra=0.0, lr=settings.lr or 0.1, copies=(), bits=shared.bits,
    )  # fmt: skip
    unattacked = {"primary_after": row["primary_marked"], "evidence_bits": verdict.evidence_bits}
    done, orders = _load_attack_results(kept), parse_attacks(shared.attacks)
    for number, order in enumerate(orders):
        if show is not None:
            show({"phase": "attacks", "step": number, "of": len(orders), "attack": column_label(order)})
        if order.text() not in done:
            done[order.text()] = run_attack(target, order, settings.seed, device).row
            worth_keeping = {text: row for text, row in done.items() if row["status"] != "failed"}
            kept.write(ATTACK_RESULTS_FILE, json.dumps(worth_keeping).encode())
        struck = compare_with_baseline(done[order.text()], unattacked, shared.bits)
        name, unread = column_label(order), struck["verdict"] == "not_verifiable"
        for column, short in _SHORT.items():
            # a mark that could not be read is not one of 0 bits
            row[f"{short} {name}"] = None if unread and column != "points_lost" else struck[column]
        if struck["status"] != "ok":
            why = f"{name}: {struck['status']} ({struck['reason']})"
            (failed if struck["status"] == "failed" else other).append(why)
        elif not unread:
            left.append(struck["evidence_bits"])
    row |= {
        # what diverged or does not apply took nothing from the owner; what failed might have taken all
        "status": "failed" if failed else "ok", "reason": next(iter(failed + other), None),
        "evidence_bits_attacked": None if failed else min(left),
    }  # fmt: skip
    row["seconds_attacks"] = round(time.monotonic() - started, 3)
    return row


def _load_attack_results(folder: Storage) -> dict[str, Row]:
    """Attacks of an interrupted cell by their text; a damaged file costs no more than doing them again."""
    try:
        found = (
            json.loads(folder.read(ATTACK_RESULTS_FILE, _LIMIT)) if folder.exists(ATTACK_RESULTS_FILE) else {}
        )
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


#: What an attack adds to a row, and how its columns begin.
_SHORT = {"wm_accuracy": "wm", "evidence_bits": "bits", "points_lost": "points lost"}
_MEASURED = ("primary_clean", "primary_marked", "validation_clean", "validation_marked")


def column_label(order: AttackPlan) -> str:
    """An attack as a part of a column's name: `prune ratio=0.6 bn=kept`."""
    return f"{order.name} {order.setting}".strip()


def load_finished_row(folder: Storage) -> Row | None:
    """A cell's kept row. Raises `ArtifactError` where it is damaged."""
    if not folder.exists(RESULT):
        return None
    try:
        row = json.loads(folder.read(RESULT, _LIMIT))
        if not isinstance(row, dict) or not isinstance(row["status"], str):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise ArtifactError(
            f"{folder.uri}/{RESULT} is damaged; delete it, and the cell runs again", field="resume"
        ) from None
    return row


def rows_of(folder: Storage) -> list[Row]:
    """The rows of a run's finished cells, from their own files alone."""
    names = [name for name in folder.list(CELLS) if name.endswith(f"/{RESULT}")]
    rows = [load_finished_row(folder.child(name.removesuffix(f"/{RESULT}"))) for name in names]
    return in_order([row for row in rows if row is not None])


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows by λ1, λ2, seed, cell."""
    return sorted(rows, key=lambda r: (r["lambda1"], r["lambda2"], r["seed"], r["cell"]))
