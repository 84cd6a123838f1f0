"""Computation of a cell: phase 1 shared between cells, then phase 2, the attacks and one row.

This module does not use Ray. `mtlsign.distributed.tune` calls it in the processes of Ray Tune; a notebook may
call it directly. A cell stores its checkpoints and its row in its own folder, so an interrupted sweep repeats
no finished cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mtlsign.attacks import parse_attacks
from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError, DivergedError, ModelError
from mtlsign.experiments.attack_runs.executor import run_attack
from mtlsign.experiments.attack_runs.results import compare_with_baseline
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.experiments.sweeps.rows import (
    RESULT_FILE,
    TRIALS,
    Row,
    column_label,
    empty_row,
    load_finished_row,
)
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.models import architectures
from mtlsign.models.loading import architecture_from_settings, custom_factories, load_initial_weights
from mtlsign.storage.base import Storage
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.result import parameter_deviation
from mtlsign.watermark.embedding.run_folder import load_state, state_bytes
from mtlsign.watermark.embedding.worker import SingleProcessContext, State
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import OwnerKit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.verdict import Verdict

ProgressCallback = Callable[[Mapping[str, Any]], None]

CLEAN, CHECKPOINT_FILE, ATTACK_RESULTS_FILE = "clean", "state.pt", "attacks.json"
_MODEL_LIMIT, _CHECKPOINT_LIMIT, _ROWS_LIMIT = 2**32, 2**34, 2**20
_MEASURED = ("primary_clean", "primary_marked", "validation_clean", "validation_marked")
#: Measurements of an attack in the row of a cell, and the first word of their columns.
_ATTACK_COLUMNS = {"wm_accuracy": "wm", "evidence_bits": "bits", "points_lost": "points lost"}


@dataclass(frozen=True)
class SharedCellData:
    """Data that all cells of a sweep share. They contain W0: SECRET, never shown.

    Attributes:
        folder: folder of the run.
        base_weights: safetensors bytes of W0 by `Cell.clean_name`.
        attacks: attack expressions.
        min_evidence_bits: evidence in bits at which a claim is accepted.
        data: folder of the datasets.
        download: let torchvision download missing data.
        tokenizer: tokenizer.json of a pretrained model, for text tasks.
    """

    folder: Storage = field(repr=False)
    base_weights: Mapping[str, bytes] = field(repr=False)
    attacks: str
    min_evidence_bits: float
    data: Path | None
    download: bool
    tokenizer: Path | None = None

    def cell(self, config: Mapping[str, Any]) -> Cell:
        """Return the cell of one of Tune's configurations."""
        return Cell(config, self.data, self.download, self.tokenizer)


@lru_cache(maxsize=1)  # a warm process runs many cells on the same task
def _cached_task(name: str, data: Path | None, download: bool, tokenizer: Path | None, seed: int) -> Task:
    return load_task(name, data=data, download=download, tokenizer=tokenizer, seed=seed)


def _task(settings: EmbedSettings) -> Task:
    return _cached_task(settings.task, settings.data, settings.download, settings.tokenizer, settings.seed)


def _context(folder: Storage, name: str, on_progress: ProgressCallback | None) -> SingleProcessContext:
    """Return a context on this machine's device whose checkpoint is the file `name`."""

    def save(state: State) -> None:
        folder.write(name, state_bytes(state))

    return SingleProcessContext(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        on_progress=on_progress,
        on_checkpoint=save,
        state=load_state(folder.read(name, _CHECKPOINT_LIMIT)) if folder.exists(name) else None,
    )


def train_shared_clean_model(
    cell: Cell, folder: Storage, on_progress: ProgressCallback | None = None
) -> bytes:
    """Train W0 for all cells with the same `clean_name`, or resume the training; a finished W0 is read.

    Args:
        cell: any of these cells.
        folder: folder of the run.
        on_progress: called with rows of progress.

    Returns:
        W0 as safetensors bytes.
    """
    clean = folder.child(CLEAN)
    model_file, checkpoint_file = f"{cell.clean_name}.safetensors", f"{cell.clean_name}.pt"
    if clean.exists(model_file):
        return _read_clean_model(clean, model_file)
    settings = cell.settings
    architecture = architecture_from_settings(settings, _task(settings).input_spec)
    if settings.weights is not None or settings.adapter is not None:
        base_weights = load_initial_weights(settings, architecture)
    else:
        context = _context(clean, checkpoint_file, on_progress)
        base_weights, _ = pipeline.run_phase1(settings, architecture, context)
    data = serialize_safetensors(base_weights)
    clean.write(model_file, data)
    clean.delete(checkpoint_file)
    return data


def _read_clean_model(clean: Storage, name: str) -> bytes:
    """Return a finished W0. Raises `ArtifactError` if its file is damaged."""
    data = clean.read(name, _MODEL_LIMIT)
    try:
        parse_safetensors(data)
    except ModelError:
        raise ArtifactError(
            f"{clean.uri}/{name} is damaged. Delete it; phase 1 is then repeated.", field="resume"
        ) from None
    return data


def run_cell(cell: Cell, shared: SharedCellData, on_progress: ProgressCallback | None = None) -> Row:
    """Run phase 2 and the attacks of a cell, and store its row.

    A finished cell returns its stored row. An interrupted cell continues at its last checkpoint and after its
    last attack. A cell that diverges has a finished row with that status. A cell with a failed attack has a
    row, too, but is not finished: the next call repeats that attack.

    Args:
        cell: the cell.
        shared: data of all cells.
        on_progress: called with rows of progress.
    """
    folder = shared.folder.child(TRIALS).child(cell.name)
    if (row := load_finished_row(folder)) is not None:
        return row
    row = empty_row(cell, "ok")
    try:
        embedding = _embed(cell, shared, folder, on_progress)
        row |= embedding.row | _attack(embedding, shared, folder, on_progress)
        if row["status"] == "failed":
            return row
    except ModelError as error:
        row |= {"status": "diverged" if isinstance(error, DivergedError) else "failed", "reason": str(error)}
    folder.write(RESULT_FILE, json.dumps(row, allow_nan=False).encode())
    folder.delete(CHECKPOINT_FILE)
    folder.delete(ATTACK_RESULTS_FILE)
    return row


@dataclass(frozen=True)
class _CellEmbedding:
    """Marked model of a cell, as the attacks need it, with its part of the row."""

    settings: EmbedSettings
    target: AttackTarget = field(repr=False)
    verdict: Verdict
    row: Row


def _embed(
    cell: Cell, shared: SharedCellData, folder: Storage, on_progress: ProgressCallback | None
) -> _CellEmbedding:
    """Run phase 2 and verify the marked model.

    The key is derived from the seed and has no evidential value. A real embedding uses the owner's identity.
    """
    settings = cell.settings
    task = _task(settings)
    architecture = architecture_from_settings(settings, task.input_spec)
    factories = custom_factories(architecture)
    base_weights = parse_safetensors(shared.base_weights[cell.clean_name])
    owner = Identity(hashlib.sha256(f"mtlsign sweep {settings.seed}".encode()).digest(), bytes(32))
    template_model = architectures.build(architecture, factories=factories)
    bases = measure_response_bases(template_model, base_weights, task, settings)
    openings, reference = commit_keys(
        template_model, base_weights, architecture, task.input_spec, settings, owner, bases=bases
    )
    context = _context(folder, CHECKPOINT_FILE, on_progress)
    marked = pipeline.run_phase2(settings, base_weights, openings, reference, context)
    detector = WatermarkDetector(openings[0], reference, head=marked.head, factories=factories)
    verdict = verify(marked.tensors, detector, bits=shared.min_evidence_bits, base_weights=base_weights)
    deviations = parameter_deviation(base_weights, marked.tensors).values()
    row: Row = {
        **{name: marked.measured[name] for name in _MEASURED},
        "drop_points": 100 * (marked.measured["validation_clean"] - marked.measured["validation_marked"]),
        "wm_accuracy": verdict.accuracy, "evidence_bits": verdict.evidence_bits,
        "wm_accuracy_on_clean": verdict.controls.get("w0", [None])[0],
        "deviation_l2": math.sqrt(sum(d * d for d in deviations)),
        "seconds_mark": round(sum(r["seconds"] for r in marked.rows), 3),
    }  # fmt: skip
    target = AttackTarget(
        tensors=serialize_safetensors(marked.tensors),
        kit=OwnerKit(openings[0], reference.raw_bytes, b"", marked.head, {}),
        architecture=architecture,
        trusted_factory=next(iter(factories), None),
        task=settings.task,
        data=settings.data,
        download=settings.download,
        split_seed=settings.seed,
        extra_data_fraction=0.0,
        learning_rate=settings.phase1.lr or 0.1,
        optimizer=settings.phase1.optimizer or "sgd",
        other_marked_models=(),
        min_evidence_bits=shared.min_evidence_bits,
    )
    return _CellEmbedding(settings, target, verdict, row)


def _attack(
    embedding: _CellEmbedding, shared: SharedCellData, folder: Storage, on_progress: ProgressCallback | None
) -> Row:
    """Run the attacks that have no stored result yet; return their part of the row."""
    started = time.monotonic()
    verdict = embedding.verdict
    baseline = {"primary_after": embedding.row["primary_marked"], "evidence_bits": verdict.evidence_bits}
    row: Row = {}
    evidence, failures, exceptions = [verdict.evidence_bits], list[str](), list[str]()
    results, plans = _load_attack_results(folder), parse_attacks(shared.attacks)
    for number, plan in enumerate(plans):
        label, text = column_label(plan), plan.text()
        if on_progress is not None:
            on_progress({"phase": "attacks", "step": number, "of": len(plans), "attack": label})
        if text not in results:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            results[text] = run_attack(embedding.target, plan, embedding.settings.seed, device).row
            finished = {key: value for key, value in results.items() if value["status"] != "failed"}
            folder.write(ATTACK_RESULTS_FILE, json.dumps(finished).encode())
        result = compare_with_baseline(results[text], baseline, shared.min_evidence_bits)
        unreadable = result["verdict"] == "not_verifiable"
        for column, first_word in _ATTACK_COLUMNS.items():
            # an unreadable watermark is not one of 0 bits
            empty = unreadable and column != "points_lost"
            row[f"{first_word} {label}"] = None if empty else result[column]
        if result["status"] != "ok":
            reason = f"{label}: {result['status']} ({result['reason']})"
            (failures if result["status"] == "failed" else exceptions).append(reason)
        elif not unreadable:
            evidence.append(result["evidence_bits"])
    # A diverged or inapplicable attack does not weaken the watermark. A failed attack might have.
    return row | {
        "status": "failed" if failures else "ok",
        "reason": next(iter(failures + exceptions), None),
        "evidence_bits_attacked": None if failures else min(evidence),
        "seconds_attacks": round(time.monotonic() - started, 3),
    }


def _load_attack_results(folder: Storage) -> dict[str, Row]:
    """Return the attacks of an interrupted cell by their text. If the file is damaged, they are repeated."""
    if not folder.exists(ATTACK_RESULTS_FILE):
        return {}
    try:
        results = json.loads(folder.read(ATTACK_RESULTS_FILE, _ROWS_LIMIT))
    except ValueError:
        return {}
    return results if isinstance(results, dict) else {}
