"""Tests of a whole sweep in this process: results, interruption, retries, resumption."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mtlsign.commands.sweep import sweep
from mtlsign.config import cli
from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import RejectedResultError, SettingsError
from mtlsign.experiments.sweeps import backend
from mtlsign.experiments.sweeps.backend import LocalSweepBackend
from mtlsign.experiments.sweeps.cell import SharedCellData, run_cell
from mtlsign.experiments.sweeps.run import run_sweep_job
from mtlsign.experiments.sweeps.run_folder import SweepRun
from mtlsign.experiments.sweeps.space import Cell
from tests.unit.experiments.sweeps.helpers import SHORT, SimulatedKill, let_first_attack_fail, tiny_sweep

COLUMNS = {
    "lambda1", "lambda2", "seed", "status", "primary_clean", "primary_marked", "wm_accuracy",
    "evidence_bits_attacked", "deviation_l2",
}  # fmt: skip


def resumed_sweep(folder: Path) -> SweepSettings:
    return SweepSettings.of({"storage": str(folder), "resume": "s", "workers": 0})


@pytest.mark.figures
def test_run_sweep_job_writes_tables_and_deletes_base_weights(tmp_path: Path) -> None:
    lines: list[str] = []
    progress: list[Mapping[str, Any]] = []
    result = run_sweep_job(
        tiny_sweep(storage=str(tmp_path), run="s", set=SHORT, min_evidence_bits=0),
        LocalSweepBackend(lines.append, progress.append),
        log=lines.append,
    )
    assert [row["phase"] for row in progress if row.get("step") in (None, 0)].count("attacks") == 4
    assert {row["phase"] for row in progress} == {"clean", "mark", "attacks"}
    folder = tmp_path / "runs/s"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert not {p for p in (folder, *folder.rglob("*")) if p.stat().st_mode & 0o077}, "private"
    cells = {f"trials/{row['cell']}/result.json" for row in result["rows"]}
    assert names == cells | {
        *(
            "settings.json",
            "space.json",
            "manifest.json",
            "result.json",
            "trials.csv",
            "trials.parquet",
            "report.html",
        )
    }
    table = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert set(table[0]) >= COLUMNS and len(table) == 4
    assert [(row["lambda1"], row["lambda2"]) for row in table] == [
        ("0.02", "0.0"), ("0.02", "1.0"), ("0.2", "0.0"), ("0.2", "1.0"),
    ]  # fmt: skip
    assert pq.read_table(folder / "trials.parquet").column("lambda1").to_pylist() == [0.02, 0.02, 0.2, 0.2]
    assert len([line for line in lines if "of the bits" in line]) == 4
    page = (folder / "report.html").read_text()
    assert "Recommended" in page and "<script" not in page and page.count("<svg") == 5
    assert "<image" not in page and "data:" not in page, "the policy of the page forbids images"
    with pytest.raises(SettingsError, match="finished"):
        SweepRun.open(tiny_sweep(storage=str(tmp_path), resume="s"))


def test_run_sweep_job_resumed_after_interruption_keeps_finished_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[str] = []

    def run_two_cells(cell: Cell, *rest: Any) -> Any:
        if len(finished) == 2:
            raise SimulatedKill
        finished.append(cell.name)
        return run_cell(cell, *rest)

    monkeypatch.setattr(backend, "run_cell", run_two_cells)
    with pytest.raises(SimulatedKill):
        run_sweep_job(tiny_sweep(storage=str(tmp_path), run="s", set=SHORT), LocalSweepBackend())
    computed: list[str] = []

    def recorded(cell: Cell, shared: SharedCellData, on_progress: Callable[..., None] | None = None) -> Any:
        return run_cell(cell, shared, lambda row: computed.append(cell.name))

    monkeypatch.setattr(backend, "run_cell", recorded)
    result = run_sweep_job(resumed_sweep(tmp_path), LocalSweepBackend())
    assert len(result["rows"]) == 4 and not set(computed) & set(finished) and len(set(computed)) == 2
    with pytest.raises(SettingsError, match="lambda"):
        SweepSettings.of({"lambda1": 3})


@pytest.mark.parametrize("force", [False, True])
def test_sweep_command_without_accepted_cell_exits_with_code_3_unless_forced(
    force: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [*SHORT, "phase2.steps=2", "lambda1=0.02"]
    argv = ["--workers=0", "--quiet", "--attacks=int8", f"--storage={tmp_path}", "--run=s"]
    argv += [f"--set={value}" for value in values] + ["--force"] * force
    with pytest.raises(SystemExit) as ended:
        cli.run(sweep, argv)
    out, err = capsys.readouterr()
    assert ended.value.code == (0 if force else RejectedResultError.exit_code)
    assert ("\nrecommended: no combination reaches" in out) == force
    page = (tmp_path / "runs/s/report.html").read_text()
    if force:
        assert err == "" and "Recommended: " in page and "(120 bits are required)" in page
    else:
        assert err.startswith("error: The sweep recommends nothing: no combination reaches the required 120")
        assert err.endswith(" With --force, a new sweep recommends the best of the rejected combinations.\n")
        assert "No combination of the 2 cells is recommended" in page and "no recommendation: " in out


def test_run_sweep_job_with_failed_cell_stays_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack_names, lines = let_first_attack_fail(monkeypatch), list[str]()
    settings = tiny_sweep(storage=str(tmp_path), run="s", set=SHORT)
    first = run_sweep_job(settings, LocalSweepBackend(), log=lines.append)
    assert (first["failed"], first["try_again"], first["ok"]) == (1, 1, 3)
    flags = f"--resume s --workers 0 --storage {tmp_path}"
    assert lines[-1] == f"1 of 4 cells failed; {flags} retries them"
    folder = tmp_path / "runs/s"
    assert (folder / "report.html").exists() and (folder / "clean").exists()
    assert not (folder / "manifest.json").exists()
    attack_names.append("resumed")
    assert first["recommended"] is None and "no combination reaches the required 120 bits" in first["why"]
    assert "No combination of the 4 cells is recommended" in (folder / "report.html").read_text()
    second = run_sweep_job(resumed_sweep(tmp_path), LocalSweepBackend(), log=lines.append)
    repeated = attack_names[attack_names.index("resumed") + 1 :]
    assert repeated == [attack_names[0]], "more than the failed attack was repeated"
    assert (second["failed"], second["try_again"], second["ok"]) == (0, 0, 4)
    assert (folder / "manifest.json").exists() and not (folder / "clean").exists()


def test_sweep_run_resume_refuses_changed_settings_and_unknown_runs(tmp_path: Path) -> None:
    run, settings = SweepRun.open(tiny_sweep(storage=str(tmp_path), run="s"))
    run.reserve_name(settings)
    with pytest.raises(SettingsError, match="attacks"):
        SweepRun.open(SweepSettings.of({"storage": str(tmp_path), "resume": "s", "attacks": "none"}))
    with pytest.raises(SettingsError, match="There is no run"):
        SweepRun.open(SweepSettings.of({"storage": str(tmp_path), "resume": "other"}))


def test_resuming_finished_sweep_deletes_leftover_checkpoints(tmp_path: Path) -> None:
    run, settings = SweepRun.open(tiny_sweep(storage=str(tmp_path), run="s"))
    run.reserve_name(settings)
    run.commit({"result.json": b"{}"}, settings)
    leftovers = ("clean/w0.safetensors", "tune-1a2b/x", "trials/a/state.pt", "trials/a/attacks.json")
    for name in (*leftovers, "trials/a/result.json"):
        run.folder.write(name, b"{}")
    with pytest.raises(SettingsError, match="finished"):
        SweepRun.open(resumed_sweep(tmp_path))
    assert run.folder.list() == ["manifest.json", "result.json", "settings.json", "trials/a/result.json"]
