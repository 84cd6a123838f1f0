"""Tests of a sweep on a real S3 server: interrupted in its second cell and resumed from its stored state."""

from __future__ import annotations

import csv
import io
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config import cli
from mtlsign.experiments.sweeps import backend
from mtlsign.experiments.sweeps.cell import SharedCellData, run_cell
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.storage.locations import open_storage
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import phase2
from tests.helpers.seaweedfs_server import S3Server

pytestmark = [pytest.mark.services, pytest.mark.timeout(300), pytest.mark.usefixtures("empty_figures")]

TINY = (
    *("lambda1=0.02", "width=4", "key_size=128", "phase1.epochs=1", "phase1.batch=16"),
    *("phase2.steps=16", "phase2.batch=16", "phase2.lr=0.01", "perturbation.kinds=noise"),
)


def test_sweep_on_s3_is_resumed_from_its_stored_state(
    s3: S3Server, tiny_task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    for module in (
        "experiments.sweeps.cell",
        "experiments.sweeps.backend",
        "experiments.attack_runs.target",
        "watermark.embedding.pipeline",
    ):
        monkeypatch.setattr(f"mtlsign.{module}.load_task", lambda *_, **__: tiny_task)
    monkeypatch.setattr(phase2, "CHECKPOINT_STEPS", 10)
    location = f"s3://{s3.bucket}/sweep"
    store = open_storage(location, endpoint=s3.endpoint)
    common = ["--storage", location, "--endpoint", s3.endpoint, "--workers", "0", "--json", "--force"]
    main = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "sweep.py"))["main"]
    steps: dict[str, list[int]] = {}

    def watch(stop: bool) -> Callable[..., Any]:
        def recorded(cell: Cell, shared: SharedCellData, on_progress: object) -> Any:
            cell_steps = steps.setdefault(cell.name, [])

            def record(row: Mapping[str, Any]) -> None:
                if row["phase"] == "mark":
                    cell_steps.append(row["step"])
                    if stop and len(steps) == 2 and row["step"] > 10:
                        raise KeyboardInterrupt

            return run_cell(cell, shared, record)

        return recorded

    def start(*flags: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(main, [*flags, *common])
        return ended.value.code, capsys.readouterr().out

    monkeypatch.setattr(backend, "run_cell", watch(stop=True))
    overrides = [f"--set={pair}" for pair in TINY]
    assert start("--space", "smoke", *overrides, "--attacks", "int8", "--run", "s") == (130, "")
    first, second = steps
    assert store.exists(f"runs/s/trials/{first}/result.json") and not store.exists("runs/s/trials.csv")
    assert store.exists(f"runs/s/trials/{second}/state.pt")
    stored = store.read(f"runs/s/trials/{first}/result.json", 2**20)
    steps.clear()
    monkeypatch.setattr(backend, "run_cell", watch(stop=False))
    monkeypatch.setattr(
        "mtlsign.watermark.embedding.pipeline.run_phase1", lambda *_: pytest.fail("phase 1 was repeated")
    )
    code, out = start("--resume", "s")
    assert code == 0 and steps[first] == [] and min(steps[second]) > 10
    rows = list(csv.DictReader(io.StringIO(store.read("runs/s/trials.csv", 2**20).decode())))
    assert [row["cell"] for row in rows] == [first, second] and [row["lambda2"] for row in rows] == [
        "0.0",
        "1.0",
    ]
    assert all(row["status"] == "ok" and float(row["bits int8"]) >= 0 for row in rows)
    assert store.read(f"runs/s/trials/{first}/result.json", 2**20) == stored
    assert json.loads(store.read("runs/s/result.json", 2**20)) == json.loads(out)
    names = {name.removeprefix("runs/s/") for name in store.list("runs/s")}
    assert names == {
        *("settings.json", "space.json", "trials.csv", "trials.parquet", "result.json", "report.html"),
        "manifest.json",
        *(f"trials/{name}/result.json" for name in (first, second)),
    }, "W0 and checkpoints must be deleted"
