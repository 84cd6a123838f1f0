"""Settings and shared data of the sweep tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.sweep import SweepSettings
from mtlsign.experiments.attack_runs import executor
from mtlsign.experiments.attack_runs.executor import AttackResult
from mtlsign.experiments.sweeps import cell as cell_module
from mtlsign.experiments.sweeps.cell import SharedCellData, train_shared_clean_model
from mtlsign.experiments.sweeps.space import Cell, cells_of, load_space
from mtlsign.storage.locations import open_storage

TINY = [
    *("width=8", "head=keyed", "key_size=128", "phase1.epochs=1", "phase1.batch=16"),
    *("phase2.steps=30", "phase2.batch=16", "phase2.lr=0.01", "perturbation.inner_steps=2"),
]
SHORT = [*TINY, "phase2.steps=6"]
ATTACKS = "bn_reparameterize,prune:ratio=0.3"


class SimulatedKill(BaseException):
    """Stands for the end of the process."""


def tiny_sweep(**changes: Any) -> SweepSettings:
    """Return the settings of a short sweep."""
    return SweepSettings.of({"space": "smoke", "set": TINY, "attacks": ATTACKS, "workers": 0, **changes})


def first_cell(settings: SweepSettings) -> Cell:
    """Return the first cell of the sweep's space."""
    return cells_of(load_space(settings), settings)[0]


def shared_data(folder: Path, cell: Cell) -> SharedCellData:
    """Train W0 of a cell in `folder` and return the shared data of a sweep there."""
    storage = open_storage(str(folder))
    base_weights = {cell.clean_name: train_shared_clean_model(cell, storage)}
    return SharedCellData(storage, base_weights, ATTACKS, 120.0, None, False)


def let_first_attack_fail(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the next attack fail; return the list that collects the names of all later attacks."""
    original, attack_names = executor.run_attack, list[str]()

    def run_attack(*args: Any) -> AttackResult:
        result = original(*args)
        attack_names.append(args[1].name)
        if len(attack_names) == 1:
            row = dict.fromkeys(result.row) | {"status": "failed", "reason": "out of memory"}
            return AttackResult(row | {"kind": "function_preserving"}, None)
        return result

    monkeypatch.setattr(cell_module, "run_attack", run_attack)
    return attack_names
