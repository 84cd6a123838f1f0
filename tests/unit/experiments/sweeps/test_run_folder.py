"""Tests of `--resume` of sweeps: an edited search space, and damaged or foreign files of cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.sweeps import run_folder
from mtlsign.experiments.sweeps.cell import train_shared_clean_model
from mtlsign.experiments.sweeps.rows import empty_row, rows_of
from mtlsign.experiments.sweeps.run_folder import SweepRun
from mtlsign.experiments.sweeps.space import describe
from mtlsign.storage.locations import open_storage
from tests.unit.experiments.sweeps.helpers import first_cell, tiny_sweep

SPACE: dict[str, Any] = {"task": "digits", "lambda1": {"grid_search": [0.1, 0.2]}, "seed": 0}


class Uniform:
    """Random value, as Ray Tune represents one."""

    def __init__(self, lower: float, upper: float) -> None:
        self.lower, self.upper, self.sampler = lower, upper, object()


@pytest.fixture
def run(tmp_path: Path) -> SweepRun:
    opened, settings = SweepRun.open(tiny_sweep(storage=str(tmp_path), run="s"))
    opened.reserve_name(settings)
    opened.bind_space("my.space:make", SPACE)
    opened.folder.write("trials/a/state.pt", b"begun")
    return opened


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lambda1": {"grid_search": [0.1, 0.3]}}, "lambda1"),
        ({"lambda1": 0.1}, "lambda1"),
        ({"lambda2": 0.0}, "lambda2"),
        ({"lambda1": Uniform(0, 1), "seed": 1}, "lambda1, seed"),
    ],
)
def test_bind_space_with_edited_space_names_changed_settings(
    changes: dict[str, Any], names: str, run: SweepRun
) -> None:
    with pytest.raises(
        SettingsError,
        match=rf"^space: The space 'my.space:make' has changed since run 's' started: {names}\.",
    ):
        run.bind_space("my.space:make", SPACE | changes)
    run.bind_space("my.space:make", dict(SPACE))


def test_bind_space_compares_random_values_by_their_limits() -> None:
    assert describe(Uniform(0, 1)) == describe(Uniform(0, 1)) != describe(Uniform(0, 2))
    assert describe((1, [2.5, None], {"a": describe})) == [
        1,
        [2.5, None],
        {"a": f"{describe.__module__}.describe"},
    ]
    json.dumps(describe(Uniform(0, 1)))


def test_resume_of_sweep_of_version_0_is_refused(run: SweepRun, tmp_path: Path) -> None:
    run.folder.write("cells/a/state.pt", b"begun")
    message = r"^resume: Run 's' has the folder 'cells' of version 0, .* Start a new run\.$"
    with pytest.raises(ArtifactError, match=message):
        SweepRun.open(tiny_sweep(storage=str(tmp_path), resume="s"))


@pytest.mark.parametrize("data", [None, b"", b"{", b"[]"])
def test_bind_space_of_missing_or_damaged_file_raises_once_cells_have_begun(
    data: bytes | None, run: SweepRun
) -> None:
    run.folder.delete(run_folder.SPACE_FILE)
    if data is not None:
        run.folder.write(run_folder.SPACE_FILE, data)
    with pytest.raises(ArtifactError, match=r"^resume: space.json of run 's' is missing or damaged"):
        run.bind_space("my.space:make", SPACE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: {"status": "ok"},
        lambda row: row | {"cell": "another"},
        lambda row: row | {"lambda1": "0.1"},
        lambda row: row | {"evidence_bits": None},
        lambda row: row | {"status": "fine"},
        lambda row: [row],
    ],
)
def test_rows_of_incomplete_or_foreign_row_raises(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    cell = first_cell(tiny_sweep(storage=str(tmp_path)))
    measures = dict.fromkeys(
        ("drop_points", "wm_accuracy", "evidence_bits", "evidence_bits_attacked", "deviation_l2"), 1.0
    )
    row, folder = empty_row(cell, "ok") | measures, open_storage(str(tmp_path))
    name = f"trials/{cell.name}/result.json"
    folder.write(name, json.dumps(row).encode())
    assert rows_of(folder) == [row]
    folder.write(name, json.dumps(damage(row)).encode())
    with pytest.raises(ArtifactError, match=r"is damaged\. Delete it; its cell is then repeated"):
        rows_of(folder)


@pytest.mark.parametrize("data", [b"", b"\0" * 20])
def test_damaged_base_weights_of_sweep_raise(data: bytes, tmp_path: Path) -> None:
    cell = first_cell(tiny_sweep(storage=str(tmp_path)))
    folder = open_storage(str(tmp_path))
    folder.write(f"clean/{cell.clean_name}.safetensors", data)
    with pytest.raises(ArtifactError, match=r"is damaged\. Delete it; phase 1 is then repeated"):
        train_shared_clean_model(cell, folder)


def test_checkpoint_of_other_base_weights_is_refused(tmp_path: Path) -> None:
    from mtlsign.watermark.embedding.run_folder import state_bytes

    cell = first_cell(tiny_sweep(storage=str(tmp_path)))
    folder = open_storage(str(tmp_path))
    folder.write(f"clean/{cell.clean_name}.pt", state_bytes({"belongs_to": "other", "history": []}))
    with pytest.raises(ArtifactError, match="belongs to another key or to other settings"):
        train_shared_clean_model(cell, folder)
