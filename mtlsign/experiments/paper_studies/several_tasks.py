"""A study of several tasks: one run for each task, and one table of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import ArtifactError, DataError, SettingsError
from mtlsign.experiments.origin import origin
from mtlsign.experiments.paper_studies import tables
from mtlsign.experiments.paper_studies.tables import RESULT, STUDY, TABLE, Row, table_files, with_all_columns
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import parse_bounded_json
from mtlsign.storage.manifest import MANIFEST
from mtlsign.storage.model_folder import RUNS
from mtlsign.storage.run_folder import SETTINGS_FILE, RunFolder
from mtlsign.tasks import check_task_name

LogCallback = Callable[[str], None]
#: The paper's nine data sets, and harmless files in the place of VirusShare, which is not public.
ALL_TASKS = (
    *("mnist", "fashion-mnist", "cifar10", "cifar100", "virusshare", "files", "imdb", "sst2"),
    *("pennfudan", "voc"),
)
_LIMIT, _VALUES = 2**24, 2**20


class TasksRun(RunFolder[ReproduceSettings]):
    """Run folder of a study of several tasks; the runs of the tasks have its name and that of the task."""

    settings_class = ReproduceSettings
    kind = "a study of several tasks"

    def task_run(self, task: str) -> str:
        """Return the name of the run of a task."""
        return f"{self.name[:60]}-{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}"[:100]

    def task_folder(self, task: str) -> Storage:
        """Return the folder of the run of a task."""
        return self.storage.child(RUNS, private=True).child(self.task_run(task))

    def check_task_runs(self, tasks: Sequence[str], *, is_new: bool) -> None:
        """Raise `SettingsError` if two tasks have one run name, or a new run would read runs of another."""
        names = [self.task_run(task) for task in tasks]
        if len(set(names)) < len(names):
            raise SettingsError(
                "Two tasks differ in signs alone, or are too long. Run them one by one.", field="task"
            )
        for task, name in zip(tasks, names, strict=True):
            if is_new and (
                self.task_folder(task).exists(SETTINGS_FILE) or self.task_folder(task).exists(MANIFEST)
            ):
                raise SettingsError(f"Run {name!r} exists. Choose another name for this run.", field="run")

    def delete_leftovers(self) -> None:
        """Delete nothing: the runs of the tasks delete their files."""


def task_names(text: str) -> list[str]:
    """Return the tasks of a study. `all` stands for the paper's data sets, `all@0.1` for a tenth of each.

    Raises:
        SettingsError: a name is empty or repeated.
        DataError: one of several names is unknown.
    """
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        head, at, share = name.partition("@")
        names += [f"{task}{at}{share}" for task in ALL_TASKS] if head == "all" else [name]
    if "" in names or len(set(names)) < len(names):
        raise SettingsError("Name every task once, separated by commas.", field="task")
    if len(names) > 1:
        for name in names:
            check_task_name(name)
    return names


def run_tasks(
    settings: ReproduceSettings,
    run_task: Callable[[ReproduceSettings], Mapping[str, Any]],
    log: LogCallback,
) -> dict[str, Any]:
    """Run a study for each of several tasks, one after the other. Finished tasks are not repeated.

    A task whose data are missing has one row with the reason. While the run of a task has failed parts, this
    run stays open and can be resumed.

    Args:
        settings: the settings; their task names several.
        run_task: runs the study of one task.
        log: called with lines for the terminal.

    Returns:
        The rows of all tasks and the text of the table, and the locations of its files.

    Raises:
        MTLSignError: an input is invalid.
    """
    is_new = settings.resume is None
    run, settings = TasksRun.open(settings)
    names = task_names(settings.task)
    run.check_task_runs(names, is_new=is_new)
    run.reserve_name(settings)
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    rows: list[Row] = []
    for task in names:
        log(f"task {task}")
        rows += [{"task": task, **row} for row in _rows_of_task(run, settings, task, run_task)]
    rows = with_all_columns(rows)
    missing = {row["task"] for row in rows if row.get("missing data")}
    result = {
        "study": settings.study, "task": settings.task, "rows": rows, "text": tables.markdown(rows),
        "table": run.location(TABLE), "result": run.location(RESULT), "run": run.name,
        "missing_data": [task for task in names if task in missing],
        "unfinished": [t for t in names if t not in missing and not run.task_folder(t).exists(MANIFEST)],
        **origin("reproduce", settings),
    }  # fmt: skip
    files = {**table_files(rows), RESULT: json.dumps(result, indent=1).encode()}
    if result["unfinished"]:
        for name, data in files.items():
            run.folder.write(name, data)
        failed = ", ".join(result["unfinished"])
        log(f"parts failed of {failed}; {settings.resume_flags(run.name)} retries them")
    else:
        run.commit(files, settings)
    return result


def _rows_of_task(
    run: TasksRun,
    settings: ReproduceSettings,
    task: str,
    run_task: Callable[[ReproduceSettings], Mapping[str, Any]],
) -> list[Row]:
    folder, name = run.task_folder(task), run.task_run(task)
    if folder.exists(MANIFEST):
        return _stored_rows(folder, name)
    if folder.exists(SETTINGS_FILE):
        names = settings.resumable & set(type(settings).model_fields) - {"resume"}
        one = ReproduceSettings.of({"study": settings.study, "task": task, "resume": name})
        one = one.updated({field: getattr(settings, field) for field in names})
    else:
        one = settings.updated({"task": task, "run": name, "resume": None})
    try:
        return list(run_task(one)["rows"])
    except DataError as error:
        if error.field != "data":
            raise
        return [{"missing data": error.detail}]


def _stored_rows(folder: Storage, name: str) -> list[Row]:
    try:
        rows = parse_bounded_json(folder.read(STUDY, _LIMIT), max_values=_VALUES)
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(
            f"{STUDY} of run {name!r} is damaged. Delete this run; its task is then repeated.", field="resume"
        )
    return rows
