"""Study of the paper: settings in, its table out, next to the results of the sweep that it consists of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mtlsign.attacks import parse_attacks
from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.reproduce import PAPER_STUDIES, SCHEME_STUDIES, ReproduceSettings
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.origin import origin
from mtlsign.experiments.paper_studies import definitions, random_keys, tables
from mtlsign.experiments.paper_studies.new_label import run_new_label_study
from mtlsign.experiments.paper_studies.property_inference import run_property_inference
from mtlsign.experiments.paper_studies.scheme_studies import run_scheme_study, scheme_names
from mtlsign.experiments.paper_studies.several_tasks import run_tasks, task_names
from mtlsign.experiments.paper_studies.tables import RESULT, TABLE, Row, table_files
from mtlsign.experiments.sweeps.backend import LocalSweepBackend, LogCallback, SweepBackend
from mtlsign.experiments.sweeps.cell import CLEAN, train_shared_clean_model
from mtlsign.experiments.sweeps.run import run_sweep_job
from mtlsign.experiments.sweeps.space import Cell, load_space
from mtlsign.schemes.detection import DEFAULT_EVIDENCE_BITS
from mtlsign.storage.json_io import parse_bounded_json, read_json_object
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import RUNS
from mtlsign.storage.run_folder import SETTINGS_FILE, RunFolder
from mtlsign.storage.safetensors_io import parse_safetensors

#: Page of the study `schemes`.
REPORT = "report.html"
_ACCURACIES_LIMIT, _KEYS_LIMIT, _SETTINGS_LIMIT = 2**26, 2**21, 2**20
#: Number of bits of the watermark, by head.
_BITS = {"spread": 1024, "keyed": 1024, "free": 600}


def run_study(
    settings: ReproduceSettings,
    *,
    make_backend: Callable[[LogCallback], SweepBackend] = LocalSweepBackend,
    log: LogCallback = lambda _: None,
) -> dict[str, Any]:
    """Run a study. `random_keys` and studies of schemes run in this process, the others as sweeps.

    A study of several tasks is one run for each task.

    Args:
        settings: the settings.
        make_backend: makes the backend of the sweep from the log callback.
        log: called with lines for the terminal.

    Returns:
        The rows and the text of the table, and the locations of its files.

    Raises:
        MTLSignError: an input is invalid; then nothing has been written.
    """
    _check(settings)
    stored = _stored_settings(settings)
    if len(task_names(str(stored.get("task") or settings.task))) > 1:
        run_one = partial(run_study, make_backend=make_backend, log=log)
        return run_tasks(settings, run_one, log)
    if settings.study == "random_keys":
        return _run_random_keys(settings, log)
    if settings.study in SCHEME_STUDIES:
        return _run_scheme_study(settings, log)
    table_rows: list[Row] = []

    def extra_files(rows: Sequence[Row]) -> dict[str, bytes]:
        table_rows.extend(tables.table(settings, rows))
        return table_files(table_rows)

    sweep = definitions.sweep_settings(settings, stored_space=_stored_space(stored))
    result = run_sweep_job(sweep, make_backend(log), log=log, extra_files=extra_files)
    table_location = result["result"].removesuffix(RESULT) + TABLE
    return _study_result(settings, table_rows, table_location, result["result"])


def _check(settings: ReproduceSettings) -> None:
    """Raise the error of a setting that the run of a task would report after its start."""
    if "paper" in settings.heads.split(",") and settings.study not in PAPER_STUDIES:
        raise SettingsError(
            f"Only {' and '.join(PAPER_STUDIES)} have the preset paper. Use free.", field="heads"
        )
    if settings.attacks is not None:
        parse_attacks(settings.attacks)
    if settings.study == "random_keys":
        if settings.overrides:
            raise SettingsError("This study embeds no watermark. Omit --set.", field="set")
    elif settings.study in SCHEME_STUDIES:
        scheme_names(settings)
        if settings.study == "property_inference" and settings.seeds < 2:
            raise SettingsError(
                "Each group needs at least two networks. Use --seeds 2 or more.", field="seeds"
            )
        EmbedSettings.of(AttackSettings.of({"set": settings.overrides}).training)
    elif settings.resume is None:
        for task in task_names(settings.task):
            load_space(definitions.sweep_settings(settings.updated({"task": task})))


def _stored_settings(settings: ReproduceSettings) -> Mapping[str, Any]:
    """Return the settings of the run to resume; none for a new or unknown run."""
    if settings.resume is None:
        return {}
    runs = open_storage(settings.storage, endpoint=settings.endpoint).child(RUNS, private=True)
    folder = runs.child(settings.resume)
    if not folder.exists(SETTINGS_FILE):
        return {}
    return read_json_object(folder.read(SETTINGS_FILE, _SETTINGS_LIMIT), SETTINGS_FILE)


def _stored_space(stored: Mapping[str, Any]) -> str | None:
    """Return the space of the run to resume; None for a new or unknown run."""
    space = stored.get("space")
    return space if isinstance(space, str) else None


def _study_result(
    settings: ReproduceSettings, rows: Sequence[Row], table: str, result: str
) -> dict[str, Any]:
    return {
        "study": settings.study, "task": settings.task, "rows": list(rows), "text": tables.markdown(rows),
        "table": table, "result": result,
    }  # fmt: skip


class StudyRun(RunFolder[ReproduceSettings]):
    """Run folder of the study `random_keys`: W0 of each seed, and the accuracies for each head and seed."""

    settings_class = ReproduceSettings
    kind = "a study"

    def load_accuracies(self, head: str, seed: int) -> list[float]:
        """Return the accuracies of an interrupted run, none at its beginning.

        Raises:
            ArtifactError: their file is damaged.
        """
        name = self._accuracies_file(head, seed)
        if not self.folder.exists(name):
            return []
        try:
            accuracies = parse_bounded_json(self.folder.read(name, _ACCURACIES_LIMIT), max_values=_KEYS_LIMIT)
        except ValueError:
            accuracies = None
        if not isinstance(accuracies, list) or not all(isinstance(share, float) for share in accuracies):
            raise ArtifactError(
                f"{name} of run {self.name!r} is damaged. Delete it; its keys are then repeated.",
                field="resume",
            )
        return accuracies

    def save_accuracies(self, head: str, seed: int, accuracies: Sequence[float]) -> None:
        """Store the accuracies so far.

        Args:
            head: `keyed` or `free`.
            seed: seed of the network.
            accuracies: one for each key, 0 to 1.
        """
        self.folder.write(self._accuracies_file(head, seed), json.dumps(list(accuracies)).encode())

    def _accuracies_file(self, head: str, seed: int) -> str:
        return f"{head}-{seed}-accuracies.json"

    def delete_leftovers(self) -> None:
        """Delete W0."""
        self.folder.delete(CLEAN)


def _run_random_keys(settings: ReproduceSettings, log: LogCallback) -> dict[str, Any]:
    """Measure random keys on each seed's unmarked network; compare the pooled keys with the binomial."""
    run, settings = StudyRun.open(settings)
    run.reserve_name(settings)
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    accuracies: dict[str, list[float]] = {head: [] for head in settings.heads.split(",")}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        config = {"task": settings.task, "model": settings.model, "width": settings.width, "seed": seed}
        base_weights = parse_safetensors(
            train_shared_clean_model(
                Cell(config, settings.data, settings.download, settings.tokenizer), run.folder
            )
        )
        log(f"seed {seed} · phase 1 is finished: the unmarked network")
        for head, pooled in accuracies.items():
            measured = random_keys.random_key_accuracies(
                settings.model_copy(update={"seed": seed}),
                head,
                base_weights,
                accuracies=run.load_accuracies(head, seed),
                on_checkpoint=partial(_store_accuracies, run, head, seed, settings.keys, log),
            )
            run.save_accuracies(head, seed, measured)
            pooled += measured
    rows = [
        {
            "head": head,
            "seeds": settings.seeds,
            **random_keys.compare_with_binomial(pooled, _BITS[head]),
        }
        for head, pooled in accuracies.items()
    ]
    result = _study_result(settings, rows, run.location(TABLE), run.location(RESULT))
    run.commit({**table_files(rows), RESULT: json.dumps(result, indent=1).encode()}, settings)
    return result


def _run_scheme_study(settings: ReproduceSettings, log: LogCallback) -> dict[str, Any]:
    """Run a study of several schemes and write its table; `schemes` has a page as well."""
    study = {"property_inference": run_property_inference, "new_label": run_new_label_study}.get(
        settings.study, run_scheme_study
    )
    run, rows = study(settings, log)
    result = _study_result(settings, rows, run.location(TABLE), run.location(RESULT))
    result |= {"run": run.name, "bits_required": DEFAULT_EVIDENCE_BITS, **origin("reproduce", settings)}
    files = table_files(rows)
    if settings.study == "schemes":
        # Imported here, because matplotlib takes a second to load.
        from mtlsign.reports.comparison import render_comparison_report

        result["report"] = run.location(REPORT)
        files[REPORT] = render_comparison_report(result).encode()
    run.commit({**files, RESULT: json.dumps(result, indent=1).encode()}, settings)
    return result


def _store_accuracies(
    run: StudyRun, head: str, seed: int, keys: int, log: LogCallback, accuracies: list[float]
) -> None:
    run.save_accuracies(head, seed, accuracies)
    log(f"seed {seed} · {head} head · {len(accuracies):,} of {keys:,} keys")
