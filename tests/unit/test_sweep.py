"""Cells, their kept rows, what is chosen from them, and a whole sweep in this process."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import ArtifactError, ModelError, SettingsError
from mtlsign.experiments.attack_runs import executor
from mtlsign.experiments.attack_runs.executor import AttackResult
from mtlsign.experiments.sweeps import pareto, run, trial
from mtlsign.experiments.sweeps.run import LocalSweepBackend, SweepRun
from mtlsign.experiments.sweeps.space import Cell, cells_of, load_space
from mtlsign.experiments.sweeps.trial import (
    SharedTrialData,
    load_finished_row,
    rows_of,
    run_cell,
    train_shared_clean_model,
)
from mtlsign.reports import sweeps, tables
from mtlsign.storage.locations import open_storage
from mtlsign.tasks import Task

FIXED = "width=8,key_size=128,epochs=1,steps=60,batch=16,primary_batch=16,wm_lr=0.01"
SHORT = FIXED.replace("steps=60", "steps=15")
ATTACKS = "bn_gauge,prune:ratio=0.3"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tiny_task: Task) -> None:
    """`digits` is the tiny task here, for cells and for what attacks them."""
    for module in (
        "experiments.sweeps.trial",
        "experiments.sweeps.run",
        "experiments.attack_runs.target",
        "watermark.embedding.pipeline",
    ):
        monkeypatch.setattr(f"mtlsign.{module}.load_task", lambda *_, **__: tiny_task)


def tiny(**changes: Any) -> SweepSettings:
    return SweepSettings.of({"space": "smoke", "fixed": FIXED, "attacks": ATTACKS, "workers": 0, **changes})


# -- spaces --------------------------------


def test_the_papers_grid_has_its_hundred_cells() -> None:
    settings = SweepSettings.of({"space": "paper_grid"})
    cells = cells_of(load_space(settings), settings)
    pairs = {(c.settings.lambda1, c.settings.lambda2) for c in cells}
    wanted = [i / 50 for i in range(1, 11)]
    assert pairs == {(a, b) for a in wanted for b in wanted} and len(cells) == 100
    assert len({c.name for c in cells}) == 100 and len({c.clean_name for c in cells}) == 1


def test_the_ablation_has_its_four_corners() -> None:
    settings = SweepSettings.of({"space": "paper_ablation"})
    found = [(c.settings.lambda1, c.settings.lambda2) for c in cells_of(load_space(settings), settings)]
    assert found == [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0), (0.1, 0.1)]


def test_repetitions_get_seeds_of_their_own() -> None:
    s = tiny(num_samples=3, seed=7)
    cells = cells_of(load_space(s), s)
    assert len(cells) == 12 and {c.settings.seed for c in cells} == {7, 8, 9}
    assert len({c.clean_name for c in cells}) == 3


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"space": "papergrid"}, "space", "paper_grid"),
        ({"space": "os:getcwd"}, "space", "no mapping"),
        ({"space": "no.such:thing"}, "space", "ModuleNotFoundError"),
        ({"fixed": "stepz=3"}, "space", "steps"),
        ({"fixed": "steps"}, "fixed", "NAME=VALUE"),
        ({"fixed": "steps=-3"}, "steps", "greater"),
        ({"fixed": "storage=/tmp"}, "space", "storage"),
        ({"fixed": "insecure_test_key=1"}, "space", "insecure_test_key"),
        ({"fixed": "lambda1=-1"}, "lambda1", "greater"),
        ({"fixed": "seed=3", "num_samples": 3}, "fixed", "as --seed"),
    ],
)
def test_bad_spaces_are_told_in_one_line(changes: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        load_space(SweepSettings.of({"space": "smoke", **changes}))
    assert field in str(caught.value)


def test_a_draw_of_what_phase_1_depends_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Draw:
        def sample(self) -> float:
            return 0.1

    monkeypatch.setattr("tune_spaces.smoke", lambda: {"task": "digits", "weight_decay": Draw()})
    with pytest.raises(SettingsError, match="weight_decay"):
        load_space(tiny(fixed=""))


def test_fixed_values_may_hold_commas() -> None:
    s = tiny(fixed="snapshots=noise,tuned,steps=30")
    assert {c.settings.snapshots for c in cells_of(load_space(s), s)} == {"noise,tuned"}


def test_a_cells_name_follows_what_it_computes_and_nothing_else() -> None:
    def name(config: Mapping[str, Any], data: str | None = None) -> str:
        return Cell(config, Path(data) if data else None, False).name

    base = name({"task": "digits", "lambda1": 0.1})
    assert name({"lambda1": 0.1, "task": "digits"}, "elsewhere") == base
    assert name({"task": "digits", "lambda1": 0.1, "lambda2": 1.0}) == base  # the default, said aloud
    others = [{"lambda1": 0.2}, {"steps": 601}, {"seed": 1}, {"snapshots": "pruned"}]
    assert base not in {name({"task": "digits", "lambda1": 0.1} | other) for other in others}


# -- cells --------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def shared_of(place: Path, cell: Cell) -> SharedTrialData:
    storage = open_storage(str(place))
    return SharedTrialData(
        storage, {cell.clean_name: train_shared_clean_model(cell, storage)}, ATTACKS, 120.0, None, False
    )


class Killed(BaseException):
    pass


def test_an_interrupted_cell_goes_on_and_gives_the_same_row(folder: Path, tmp_path: Path) -> None:
    s = tiny()
    cell = cells_of(load_space(s), s)[0]
    whole = run_cell(cell, shared_of(folder, cell))
    steps: list[int] = []

    def kill(row: Mapping[str, Any]) -> None:
        steps.append(row["step"])
        if "wm_loss" in row and row["step"] > 50:
            raise Killed

    shared = shared_of(tmp_path, cell)
    with pytest.raises(Killed):
        run_cell(cell, shared, kill)
    assert load_finished_row(shared.folder.child(f"cells/{cell.name}")) is None
    steps.clear()
    again = run_cell(cell, shared, lambda row: steps.append(row["step"]) if row["phase"] == "mark" else None)
    assert min(steps) > 50, "the checkpoint of step 50 was not used"
    timeless = {k for k in whole if not k.startswith("seconds")}
    assert {k: again[k] for k in timeless} == {k: whole[k] for k in timeless}
    assert rows_of(shared.folder) == [again]
    assert not shared.folder.exists(f"cells/{cell.name}/state.pt")


def test_an_attack_that_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = tiny()
    cell = cells_of(load_space(s), s)[0]
    shared, real, seen = shared_of(tmp_path, cell), executor.run_attack, []

    def strike(*args: Any) -> Any:
        seen.append(args[1].name)
        if len(seen) == 2:
            raise Killed
        return real(*args)

    monkeypatch.setattr(trial, "strike", strike)
    kept = shared.folder.child(f"cells/{cell.name}")
    kept.write("attacks.json", b"{ damaged")
    with pytest.raises(Killed):
        run_cell(cell, shared)
    row = run_cell(cell, shared)
    assert seen == ["bn_gauge", "prune", "prune"]
    assert row["bits bn_gauge"] is not None and row["bits prune ratio=0.3 bn=kept"] is not None
    assert not shared.folder.exists(f"cells/{cell.name}/attacks.json")


def first_attack_fails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the attacks that run from now on; the first of them is a failed one."""
    real, ran = executor.run_attack, []

    def strike(*args: Any) -> Any:
        struck = real(*args)
        ran.append(args[1].name)
        if len(ran) == 1:
            row = dict.fromkeys(struck.row) | {"status": "failed", "reason": "out of memory"}
            return AttackResult(row | {"kind": "free"}, None)
        return struck

    monkeypatch.setattr(trial, "strike", strike)
    return ran


def test_a_cell_is_not_finished_before_its_failed_attacks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = tiny(fixed=SHORT)
    cell = cells_of(load_space(s), s)[0]
    shared, seen = shared_of(tmp_path, cell), first_attack_fails(monkeypatch)
    kept = shared.folder.child(f"cells/{cell.name}")
    row = run_cell(cell, shared)
    assert (row["status"], row["evidence_bits_attacked"]) == ("failed", None)
    assert row["reason"] == "bn_gauge: failed (out of memory)" and row["bits prune ratio=0.3 bn=kept"] > 0
    assert load_finished_row(kept) is None and pareto.aggregate_over_seeds([row], ["lambda1"]) == []
    again = run_cell(cell, shared)
    assert seen == ["bn_gauge", "prune", "bn_gauge"], "what had worked was done again"
    assert again["status"] == "ok" and again["reason"] is None and load_finished_row(kept) == again
    bits = [again[name] for name in again if name.startswith("bits ")]
    assert again["evidence_bits_attacked"] == min(again["evidence_bits"], *bits)


def test_attacks_that_end_without_a_readable_model_take_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = tiny(fixed=SHORT)
    cell = cells_of(load_space(s), s)[0]
    shared, real = shared_of(tmp_path, cell), executor.run_attack

    def strike(*args: Any) -> Any:
        row = real(*args).row
        if args[1].name == "prune":
            return AttackResult(
                dict.fromkeys(row) | {"status": "diverged", "reason": "NaN", "kind": "removal"}, None
            )
        return AttackResult(
            row | {"verdict": "not_verifiable", "wm_accuracy": 0.0, "evidence_bits": 0.0}, None
        )

    monkeypatch.setattr(trial, "strike", strike)
    row = run_cell(cell, shared)
    assert row["status"] == "ok" and row["evidence_bits_attacked"] == row["evidence_bits"] > 0
    assert row["wm bn_gauge"] is None and row["bits bn_gauge"] is None, "an unread mark is not one of 0 bits"
    assert row["points lost bn_gauge"] == 0 and "diverged" in row["reason"]


def test_arms_are_settings_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [{"snapshots": "tuned"}, {"snapshots": "noise", "lambda2": 0.0}]
    space = {"task": "digits", "arm": {"grid_search": arms}, "lambda1": {"grid_search": [0.0, 0.1]}}
    monkeypatch.setattr("tune_spaces.smoke", lambda: space)
    s = tiny()
    found = [cell.settings for cell in cells_of(load_space(s), s)]
    assert [(c.snapshots, c.lambda2, c.lambda1) for c in found] == [
        ("tuned", 1, 0), ("tuned", 1, 0.1), ("noise", 0, 0), ("noise", 0, 0.1),
    ]  # fmt: skip
    for arm, says in ((3, "mappings"), ({"stepz": 1}, "steps"), ({"storage": "x"}, "storage")):
        monkeypatch.setattr("tune_spaces.smoke", lambda arm=arm: {"arm": {"grid_search": [arm]}})
        with pytest.raises(SettingsError, match=says):
            load_space(s)


def test_a_row_holds_what_others_rely_on_and_no_secret(folder: Path) -> None:
    s = tiny()
    cell = cells_of(load_space(s), s)[0]
    row = run_cell(cell, shared_of(folder, cell))
    assert row["status"] == "ok" and 0 <= row["primary_marked"] <= 1 and row["deviation_l2"] > 0
    assert row["evidence_bits_attacked"] == min(
        row["evidence_bits"], *(row[name] for name in row if name.startswith("bits "))
    )
    assert len([name for name in row if name.startswith("bits ")]) == 2
    assert not {"key", "nonce", "spec", "head"} & set(json.dumps(row).replace('"', " ").split())
    kept = (folder / "cells" / cell.name / "result.json").read_text()
    assert json.loads(kept) == row


def test_a_diverging_cell_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = tiny()
    cell = cells_of(load_space(s), s)[0]
    shared = shared_of(tmp_path, cell)

    def diverge(*_: Any) -> None:
        raise ModelError("phase 2 diverged (the loss is not finite); lower --wm-lr", field="wm-lr")

    monkeypatch.setattr("mtlsign.watermark.embedding.pipeline.run_phase2", diverge)
    row = run_cell(cell, shared)
    assert row["status"] == "diverged" and "wm-lr" in row["reason"] and row["evidence_bits"] is None
    assert load_finished_row(shared.folder.child(f"cells/{cell.name}")) == row, (
        "it would be tried again and again"
    )


def test_a_damaged_row_is_not_believed(tmp_path: Path) -> None:
    place = open_storage(str(tmp_path))
    place.write("cells/abc/result.json", b'{"status": 3}')
    with pytest.raises(ArtifactError, match="damaged"):
        rows_of(place)


def test_phase_1_is_trained_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = tiny(fixed=FIXED.replace("epochs=1", "epochs=2"))
    cell, place = cells_of(load_space(s), s)[0], open_storage(str(tmp_path))

    def kill(row: Mapping[str, Any]) -> None:
        if row.get("validation_accuracy") is not None and row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train_shared_clean_model(cell, place, kill)
    epochs: list[int] = []
    data = train_shared_clean_model(cell, place, lambda row: epochs.append(row["epoch"]))
    assert set(epochs) == {2}, "the first epoch was trained again"
    monkeypatch.setattr(
        "mtlsign.watermark.embedding.pipeline.run_phase1", lambda *_: pytest.fail("trained twice")
    )
    assert train_shared_clean_model(cell, place) == data


# -- what is chosen --------------------------------

numbers = st.floats(-5, 5).map(lambda x: round(x, 1))
groups = st.lists(
    st.fixed_dictionaries(
        {
            "drop_points": numbers,
            "evidence_bits_attacked": numbers,
            "deviation_l2": numbers,
            "lambda1": numbers,
            "n": st.integers(1, 3),
            "cells": st.just(3),
        }
    ),
    max_size=12,
)


def better(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    pairs = [
        (b["drop_points"], a["drop_points"]),
        (a["evidence_bits_attacked"], b["evidence_bits_attacked"]),
        (b["deviation_l2"], a["deviation_l2"]),
    ]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


@given(groups)
def test_the_front_is_what_nothing_beats(found: list[dict[str, float]]) -> None:
    chosen = pareto.pareto_front(found)
    assert all(not any(better(a, b) for a in found) for b in chosen)
    assert all(any(better(a, b) for a in found) for b in found if b not in chosen)
    assert bool(found) == bool(chosen)


@given(groups, st.floats(0, 3))
def test_the_recommendation_keeps_the_task_where_it_can(found: list[dict[str, float]], most: float) -> None:
    best, why = pareto.recommend(found, most)
    if not found:
        assert best is None and why
        return
    assert best is not None
    whole = [g for g in found if g["n"] == 3]
    assert best["n"] == 3 or (not whole and f"only {best['n']} of its 3 cells" in why)
    assert ("are left out" in why) == (0 < len(whole) < len(found))
    within = [g for g in whole or found if g["drop_points"] <= most]
    if within:
        assert best["evidence_bits_attacked"] == max(g["evidence_bits_attacked"] for g in within)
    else:
        assert best["drop_points"] == min(g["drop_points"] for g in whole or found)


def test_means_leave_out_what_did_not_finish() -> None:
    def row(status: str, seed: int, bits: float | None) -> dict[str, Any]:
        return {
            "status": status, "lambda1": 0.1, "seed": seed, "drop_points": 0.0, "deviation_l2": 1.0,
            "evidence_bits_attacked": bits, "wm_accuracy": 1.0,
        }  # fmt: skip

    rows = [row("ok", 0, 100), row("ok", 1, 110), row("diverged", 2, None), row("stopped", 3, 9)]
    (mean,) = pareto.aggregate_over_seeds(rows, ["lambda1"])
    assert (mean["n"], mean["cells"]) == (2, 4) and mean["evidence_bits_attacked"] == 105
    assert mean["sd evidence_bits_attacked"] == pytest.approx(7.0710678)


def test_cells_that_did_not_finish_vary_in_nothing_but_their_settings() -> None:
    space = {"task": "digits", "width": 8, "steps": 30, "lambda2": {"grid_search": [0.0, 1.0]}, "seed": 0}
    cells = [Cell({**space, "lambda2": value}, None, False) for value in (0.0, 1.0)]
    rows = [trial.empty_row(cells[0], "ok"), trial.empty_row(cells[1], "stopped", "stopped at step 3")]
    assert run.varied_settings(rows, space) == ["lambda1", "lambda2"]
    assert (rows[1]["lambda2"], rows[1]["steps"], rows[1]["reason"]) == (1.0, 30, "stopped at step 3")


# -- the whole --------------------------------


def test_a_sweep_writes_its_tables_and_forgets_w0(tmp_path: Path) -> None:
    said: list[str] = []
    shown: list[Mapping[str, Any]] = []
    fleet = LocalSweepBackend(said.append, shown.append)
    result = run.run(tiny(storage=str(tmp_path), run="s"), fleet, say=said.append)
    assert [row["phase"] for row in shown if row.get("step") in (None, 0)].count("attacks") == 4
    assert {row["phase"] for row in shown} == {"clean", "mark", "attacks"}
    place = tmp_path / "runs/s"
    names = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    cells = {f"cells/{row['cell']}/result.json" for row in result["rows"]}
    assert names == cells | {
        *("settings.json", "manifest.json", "result.json", "cells.csv", "cells.parquet", "report.html")
    }
    table = list(csv.DictReader(io.StringIO((place / "cells.csv").read_text())))
    wanted = (
        "lambda1 lambda2 seed status primary_clean primary_marked wm_accuracy evidence_bits_attacked "
        "deviation_l2"
    )
    assert set(wanted.split()) <= set(table[0]) and len(table) == 4
    assert [(r["lambda1"], r["lambda2"]) for r in table] == [
        ("0.02", "0.0"), ("0.02", "1.0"), ("0.2", "0.0"), ("0.2", "1.0"),
    ]  # fmt: skip
    assert pq.read_table(place / "cells.parquet").column("lambda1").to_pylist() == [0.02, 0.02, 0.2, 0.2]
    assert len([line for line in said if "of the bits" in line]) == 4
    page = (place / "report.html").read_text()
    assert "Recommended" in page and "<script" not in page and page.count("<svg") == 5
    assert "<image" not in page and "data:" not in page, "the page's own policy forbids images"
    with pytest.raises(SettingsError, match="finished"):
        SweepRun.open(tiny(storage=str(tmp_path), resume="s"))


def test_a_killed_sweep_keeps_its_finished_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ran = trial.run_cell, []

    def two_then_dead(cell: Cell, *rest: Any) -> Any:
        if len(ran) == 2:
            raise Killed
        ran.append(cell.name)
        return real(cell, *rest)

    monkeypatch.setattr(run, "run_cell", two_then_dead)
    with pytest.raises(Killed):
        run.run(tiny(storage=str(tmp_path), run="s"), LocalSweepBackend())
    marks: list[str] = []

    def counted(cell: Cell, shared: SharedTrialData, show: Callable[..., None] | None = None) -> Any:
        return real(cell, shared, lambda row: marks.append(cell.name))

    monkeypatch.setattr(run, "run_cell", counted)
    result = run.run(
        SweepSettings.of({"storage": str(tmp_path), "resume": "s", "workers": 0}), LocalSweepBackend()
    )
    assert len(result["rows"]) == 4 and not set(marks) & set(ran) and len(set(marks)) == 2
    with pytest.raises(SettingsError, match="lambda"):
        SweepSettings.of({"lambda1": 3})


def test_a_sweep_with_failed_cells_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, said = first_attack_fails(monkeypatch), []
    first = run.run(tiny(storage=str(tmp_path), run="s"), LocalSweepBackend(), say=said.append)
    assert (first["failed"], first["try_again"], first["ok"]) == (1, 1, 3)
    assert said[-1] == "1 of 4 cells failed; --resume s tries again what failed"
    place = tmp_path / "runs/s"
    assert (place / "report.html").exists() and (place / "clean").exists()
    assert not (place / "manifest.json").exists()
    ran.append("again")
    resumed = SweepSettings.of({"storage": str(tmp_path), "resume": "s", "workers": 0})
    second = run.run(resumed, LocalSweepBackend(), say=said.append)
    assert ran[ran.index("again") + 1 :] == [ran[0]], "more was done again than what had failed"
    assert (second["failed"], second["try_again"], second["ok"]) == (0, 0, 4)
    assert (place / "manifest.json").exists() and not (place / "clean").exists()


def test_resume_refuses_other_science(tmp_path: Path) -> None:
    kept, s = SweepRun.open(tiny(storage=str(tmp_path), run="s"))
    kept.begin(s)
    with pytest.raises(SettingsError, match="attacks"):
        SweepRun.open(SweepSettings.of({"storage": str(tmp_path), "resume": "s", "attacks": "none"}))
    with pytest.raises(SettingsError, match="no run"):
        SweepRun.open(SweepSettings.of({"storage": str(tmp_path), "resume": "other"}))


def test_tables_keep_types_and_gaps() -> None:
    rows = [{"a": 1, "b": True, "c": None, "d": "x,y"}, {"a": 2.5, "b": None, "d": 3}]
    assert tables.csv_of(rows, ["a", "b", "c", "d"]) == b'a,b,c,d\n1,true,,"x,y"\n2.5,,,3\n'
    read = pq.read_table(io.BytesIO(tables.parquet_of(rows, ["a", "b", "c", "d"])))
    assert read.to_pylist() == [
        {"a": 1.0, "b": True, "c": None, "d": "x,y"},
        {"a": 2.5, "b": None, "c": None, "d": "3"},
    ]


def test_a_cell_is_told_whatever_its_settings_were_written_as() -> None:
    assert run.format_trial(None, {"lambda1": "0.02"}) == "lambda1 0.02 · stopped early"
    row = {"lambda1": 0.02, "lambda2": 1.0, "status": "failed", "reason": "why"}
    assert run.format_trial(row, {"lambda1": "0.02"}) == "lambda1 0.02, lambda2 1.0 · failed: why"


@pytest.mark.parametrize(("bits", "warned"), [(50.0, True), (120.0, False)])
def test_a_recommendation_that_is_too_weak_says_so(bits: float, warned: bool) -> None:
    best = {"lambda1": 0.02, "lambda2": 0.1, "evidence_bits_attacked": bits, "drop_points": 0.2}
    text = sweeps._headline(
        {"recommended": best, "vary": ["lambda1", "lambda2"], "bits_required": 120.0, "cells": 1}
    )
    assert ("(120 are asked for)" in text) == warned and "loses 0.20 points" in text
