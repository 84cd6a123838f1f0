"""Tests of the computation of cells: interruption, failed attacks, stored rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mtlsign.errors import DivergedError
from mtlsign.experiments.attack_runs import executor
from mtlsign.experiments.attack_runs.executor import AttackResult
from mtlsign.experiments.sweeps import cell as cell_module
from mtlsign.experiments.sweeps import pareto
from mtlsign.experiments.sweeps.cell import run_cell, train_shared_clean_model
from mtlsign.experiments.sweeps.rows import load_finished_row, rows_of
from mtlsign.storage.locations import open_storage
from mtlsign.watermark.embedding import phase2
from tests.unit.experiments.sweeps.helpers import (
    SHORT,
    TINY,
    SimulatedKill,
    first_cell,
    let_first_attack_fail,
    shared_data,
    tiny_sweep,
)


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the first test finishes a cell."""
    return tmp_path_factory.mktemp("sweep")


def test_run_cell_resumed_after_interruption_gives_same_row(
    finished_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase2, "CHECKPOINT_STEPS", 20)
    cell = first_cell(tiny_sweep())
    uninterrupted = run_cell(cell, shared_data(finished_folder, cell))
    steps: list[int] = []

    def kill(row: Mapping[str, Any]) -> None:
        steps.append(row["step"])
        if "wm_loss" in row and row["step"] > 20:
            raise SimulatedKill

    shared = shared_data(tmp_path, cell)
    with pytest.raises(SimulatedKill):
        run_cell(cell, shared, kill)
    assert load_finished_row(shared.folder.child(f"trials/{cell.name}")) is None
    steps.clear()
    resumed = run_cell(
        cell, shared, lambda row: steps.append(row["step"]) if row["phase"] == "mark" else None
    )
    assert min(steps) > 20, "the checkpoint of step 20 was not used"
    compared = {name for name in uninterrupted if not name.startswith("seconds")}
    assert {name: resumed[name] for name in compared} == {name: uninterrupted[name] for name in compared}
    assert rows_of(shared.folder) == [resumed]
    assert not shared.folder.exists(f"trials/{cell.name}/state.pt")


def test_run_cell_resumed_does_not_repeat_finished_attacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = first_cell(tiny_sweep(set=SHORT))
    shared, original = shared_data(tmp_path, cell), executor.run_attack
    attack_names: list[str] = []

    def run_attack(*args: Any) -> Any:
        attack_names.append(args[1].name)
        if len(attack_names) == 2:
            raise SimulatedKill
        return original(*args)

    monkeypatch.setattr(cell_module, "run_attack", run_attack)
    shared.folder.child(f"trials/{cell.name}").write("attacks.json", b"{ damaged")
    with pytest.raises(SimulatedKill):
        run_cell(cell, shared)
    row = run_cell(cell, shared)
    assert attack_names == ["bn_reparameterize", "prune", "prune"]
    assert row["bits bn_reparameterize"] is not None and row["bits prune ratio=0.3 bn=kept"] is not None
    assert not shared.folder.exists(f"trials/{cell.name}/attacks.json")


def test_run_cell_with_failed_attack_is_not_finished_and_repeats_only_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = first_cell(tiny_sweep(set=SHORT))
    shared, attack_names = shared_data(tmp_path, cell), let_first_attack_fail(monkeypatch)
    folder = shared.folder.child(f"trials/{cell.name}")
    row = run_cell(cell, shared)
    assert (row["status"], row["evidence_bits_attacked"]) == ("failed", None)
    assert row["reason"] == "bn_reparameterize: failed (out of memory)"
    assert row["bits prune ratio=0.3 bn=kept"] > 0
    assert load_finished_row(folder) is None and pareto.aggregate_over_seeds([row], ["lambda1"]) == []
    retried = run_cell(cell, shared)
    assert attack_names == ["bn_reparameterize", "prune", "bn_reparameterize"]
    assert retried["status"] == "ok" and retried["reason"] is None and load_finished_row(folder) == retried
    bits = [retried[name] for name in retried if name.startswith("bits ")]
    assert retried["evidence_bits_attacked"] == min(retried["evidence_bits"], *bits)


def test_run_cell_diverged_or_unreadable_attack_removes_no_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = first_cell(tiny_sweep(set=SHORT))
    shared, original = shared_data(tmp_path, cell), executor.run_attack

    def run_attack(*args: Any) -> AttackResult:
        row = original(*args).row
        if args[1].name == "prune":
            changes = {"status": "diverged", "reason": "NaN", "kind": "removal"}
            return AttackResult(dict.fromkeys(row) | changes, None)
        return AttackResult(
            row | {"verdict": "not_verifiable", "wm_accuracy": 0.0, "evidence_bits": 0.0}, None
        )

    monkeypatch.setattr(cell_module, "run_attack", run_attack)
    row = run_cell(cell, shared)
    assert row["status"] == "ok" and row["evidence_bits_attacked"] == row["evidence_bits"] > 0
    unreadable = (row["wm bn_reparameterize"], row["bits bn_reparameterize"])
    assert unreadable == (None, None), "an unreadable watermark is not one of 0 bits"
    assert row["points lost bn_reparameterize"] == 0 and "diverged" in row["reason"]


def test_run_cell_row_holds_measurements_and_no_secret(finished_folder: Path) -> None:
    cell = first_cell(tiny_sweep())
    row = run_cell(cell, shared_data(finished_folder, cell))
    assert row["status"] == "ok" and 0 <= row["primary_marked"] <= 1 and row["deviation_l2"] > 0
    bits = [row[name] for name in row if name.startswith("bits ")]
    assert row["evidence_bits_attacked"] == min(row["evidence_bits"], *bits) and len(bits) == 2
    others = {name: value for name, value in row.items() if name != "head"}  # the setting of this sweep
    assert not {"key", "nonce", "spec", "head"} & set(json.dumps(others).replace('"', " ").split())
    stored = (finished_folder / "trials" / cell.name / "result.json").read_text()
    assert json.loads(stored) == row


def test_run_cell_that_diverges_has_finished_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = first_cell(tiny_sweep())
    shared = shared_data(tmp_path, cell)

    def diverge(*_: Any) -> None:
        raise DivergedError("The loss of phase 2 is not finite. Lower --phase2.lr.", field="phase2.lr")

    monkeypatch.setattr("mtlsign.watermark.embedding.pipeline.run_phase2", diverge)
    row = run_cell(cell, shared)
    assert row["status"] == "diverged" and "phase2.lr" in row["reason"] and row["evidence_bits"] is None
    stored = load_finished_row(shared.folder.child(f"trials/{cell.name}"))
    assert stored == row, "the cell would be repeated without end"


def test_train_shared_clean_model_is_resumed_and_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = first_cell(tiny_sweep(set=[*TINY, "phase1.epochs=2"]))
    folder = open_storage(str(tmp_path))

    def kill(row: Mapping[str, Any]) -> None:
        if row.get("validation_accuracy") is not None and row["epoch"] == 2:
            raise SimulatedKill

    with pytest.raises(SimulatedKill):
        train_shared_clean_model(cell, folder, kill)
    epochs: list[int] = []
    data = train_shared_clean_model(cell, folder, lambda row: epochs.append(row["epoch"]))
    assert set(epochs) == {2}, "the first epoch was repeated"
    monkeypatch.setattr(
        "mtlsign.watermark.embedding.pipeline.run_phase1", lambda *_: pytest.fail("trained twice")
    )
    assert train_shared_clean_model(cell, folder) == data


def test_run_cell_with_two_keys_reports_the_first(tmp_path: Path) -> None:
    cell = first_cell(tiny_sweep(set=[*SHORT, "keys=2"]))
    row = run_cell(cell, shared_data(tmp_path, cell))
    assert row["status"] == "ok" and row["keys"] == "2" and 0 <= row["wm_accuracy"] <= 1
