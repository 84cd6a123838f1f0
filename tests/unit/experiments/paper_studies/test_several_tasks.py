from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import ArtifactError, DataError, SettingsError
from mtlsign.experiments.paper_studies import scheme_studies, tables
from mtlsign.experiments.paper_studies.run import run_study
from mtlsign.experiments.paper_studies.several_tasks import ALL_TASKS, run_tasks, task_names
from tests.unit.experiments.attack_runs.test_run import FACTORY


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a study on two tiny tasks and one without data."""
    (tmp_path / "firsttask.py").write_text(FACTORY)
    (tmp_path / "secondtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "study": "false_claims", "task": "firsttask:task,mnist,secondtask:task", "width": 8, "seeds": 1,
        "storage": str(tmp_path / "store"), "data": str(tmp_path), "schemes": "uchida,new_label", "run": "s",
    }  # fmt: skip


def test_names_of_tasks_are_separated_by_commas_or_all() -> None:
    assert task_names("digits") == ["digits"]
    assert task_names("mnist@0.1, digits") == ["mnist@0.1", "digits"]
    assert task_names("all") == list(ALL_TASKS) and "fashion-mnist" in ALL_TASKS
    assert task_names("all@0.05")[0] == f"{ALL_TASKS[0]}@0.05"


@pytest.mark.parametrize("text", ["mnist,", "mnist,mnist", "all,mnist"])
def test_empty_or_repeated_task_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="task: Name every task once"):
        task_names(text)


def test_unknown_task_among_several_is_refused_before_all(values: dict[str, Any], tmp_path: Path) -> None:
    for name, reason in (("mnits", "Did you mean 'mnist'"), ("digits@0.5", "Unknown"), ("mnist@2", "share")):
        with pytest.raises(DataError, match=f"task: .*{reason}"):
            run_study(ReproduceSettings.of({**values, "task": f"firsttask:task,{name}"}))
    assert not (tmp_path / "store" / "runs").exists()


def test_error_of_another_setting_ends_the_study(values: dict[str, Any], tmp_path: Path) -> None:
    def run_task(settings: ReproduceSettings) -> dict[str, Any]:
        raise DataError("The task has no texts for a tokenizer.", field="tokenizer")

    with pytest.raises(DataError, match="tokenizer: "):
        run_tasks(ReproduceSettings.of(values), run_task, lambda _: None)


def test_study_of_several_tasks_has_one_run_each_and_one_table(
    values: dict[str, Any], tmp_path: Path
) -> None:
    result = run_study(ReproduceSettings.of(values))
    cells = [(row["task"], row["scheme"], row["accepted"]) for row in result["rows"]]
    assert cells == [
        ("firsttask:task", "uchida", 1), ("firsttask:task", "new_label", 0), ("mnist", None, None),
        ("secondtask:task", "uchida", 1), ("secondtask:task", "new_label", 0),
    ]  # fmt: skip
    assert "MNIST" in result["rows"][2]["missing data"] and result["missing_data"] == ["mnist"]
    assert result["unfinished"] == []
    runs = tmp_path / "store" / "runs"
    names = ("s", "s-firsttask-task", "s-secondtask-task")
    assert [name for name in names if (runs / name / "manifest.json").exists()] == list(names)
    assert not (runs / "s-mnist" / "manifest.json").exists()
    assert json.loads((runs / "s" / "study.json").read_text()) == result["rows"]
    assert (runs / "s" / "study.csv").read_text().startswith("task,")
    with pytest.raises(SettingsError, match="resume: Run 's' is finished"):
        run_study(ReproduceSettings.of({**values, "run": None, "resume": "s"}))


def test_interrupted_study_repeats_no_finished_part(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forge, calls = scheme_studies.forge_on_base, []

    def interrupted(plan: Any, seed: int, folder: Any) -> Any:
        calls.append((plan.settings.task, plan.scheme.name))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forge(plan, seed, folder)

    monkeypatch.setattr(scheme_studies, "forge_on_base", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(ReproduceSettings.of(values))
    by_name = {name: values[name] for name in ("study", "storage", "data")} | {"resume": "s"}
    result = run_study(ReproduceSettings.of(by_name))
    first, second = "firsttask:task", "secondtask:task"
    tried = [(first, "uchida"), (first, "new_label"), (second, "uchida"), (second, "new_label")]
    assert calls == [*tried, (second, "new_label")]
    assert [row["accepted"] for row in result["rows"]] == [1, 0, None, 1, 0]


def test_study_with_failed_parts_stays_open(values: dict[str, Any], tmp_path: Path) -> None:
    def run_task(settings: ReproduceSettings) -> dict[str, Any]:
        if settings.task == "mnist":
            raise DataError("no file", field="data")
        return {"rows": [{"head": "keyed"}]}  # no manifest: a part failed

    lines: list[str] = []
    settings = ReproduceSettings.of(values)
    result = run_tasks(settings, run_task, lines.append)
    assert result["unfinished"] == ["firsttask:task", "secondtask:task"]
    assert "--resume s" in lines[-1] and "secondtask:task" in lines[-1]
    folder = tmp_path / "store" / "runs" / "s"
    assert not (folder / "manifest.json").exists() and (folder / "study.csv").exists()


def test_damaged_rows_of_finished_task_raise_artifact_error(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scheme_studies, "forge_on_base", interrupted)
        run_study(ReproduceSettings.of(values))
    folder = tmp_path / "store" / "runs" / "s-firsttask-task"
    (folder / "manifest.json").write_text("{}")
    (folder / tables.STUDY).write_text('[{"a": 1}, 2]')
    with pytest.raises(ArtifactError, match=r"study\.json of run 's-firsttask-task' is damaged"):
        run_study(ReproduceSettings.of({k: v for k, v in values.items() if k != "run"} | {"resume": "s"}))


@pytest.mark.parametrize("file", ["settings.json", "manifest.json"])
def test_new_study_reads_no_runs_of_another(values: dict[str, Any], tmp_path: Path, file: str) -> None:
    folder = tmp_path / "store" / "runs" / "s-secondtask-task"
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    (folder / tables.STUDY).write_text('[{"a": 1}]')
    with pytest.raises(SettingsError, match="run: Run 's-secondtask-task' exists"):
        run_study(ReproduceSettings.of(values))
    assert not (tmp_path / "store" / "runs" / "s").exists()


def test_tasks_with_the_same_run_name_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="task: Two tasks differ in signs alone"):
        run_study(ReproduceSettings.of({**values, "task": "first-:task,first:-task"}))


def test_rows_of_different_tasks_have_the_same_columns() -> None:
    rows = tables.with_all_columns([{"task": "a", "x": 1}, {"task": "b", "y": 2}])
    assert rows == [{"task": "a", "x": 1, "y": None}, {"task": "b", "x": None, "y": 2}]
