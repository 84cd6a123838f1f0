"""Running a study of the paper: settings in, its table out, beside the sweep that it consists of."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from mtlsign.config.base import dump
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.config.sweep import CHANGEABLE
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.paper_studies import definitions, random_keys
from mtlsign.experiments.sweeps.run import LocalSweepBackend, LogCallback, SweepBackend, run
from mtlsign.experiments.sweeps.space import Cell
from mtlsign.experiments.sweeps.trial import CLEAN, train_shared_clean_model
from mtlsign.reports.tables import csv_of
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, write_manifest_folder
from mtlsign.storage.model_folder import RUNS
from mtlsign.storage.safetensors_io import parse_safetensors

TABLE, TEXT, STUDY = "study.csv", "study.md", "study.json"
_GUESSES = "guesses.json"
_LIMIT = 2**26


def run_study(
    settings: ReproduceSettings,
    *,
    fleet: Callable[[LogCallback], SweepBackend] = LocalSweepBackend,
    say: LogCallback = lambda _: None,
) -> dict[str, Any]:
    """Run the study (`ablation` and `overwriting` in the places of `fleet`, `thresholds` here).

    Returns: `rows` and `text` of the table, and where it lies.
    Raises: MTLSignError: bad input; then nothing has been written.
    """
    if settings.study == "thresholds":
        return _run_random_keys(settings, say)
    tables: list[dict[str, Any]] = []

    def more(rows: Sequence[definitions.Row]) -> dict[str, bytes]:
        tables.extend(definitions.table(settings, rows))
        return _files(tables)

    result = run(definitions.sweep_settings(settings), fleet(say), say=say, more=more)
    place = result["result"].removesuffix("result.json")
    return _study_result(settings, tables, place, result["result"])


def _files(rows: Sequence[definitions.Row]) -> dict[str, bytes]:
    columns = list(rows[0]) if rows else []
    return {
        TABLE: csv_of(rows, columns),
        TEXT: (definitions.markdown(rows) + "\n").encode(),
        STUDY: json.dumps(list(rows), indent=1, allow_nan=False).encode(),
    }


def _study_result(
    settings: ReproduceSettings, rows: Sequence[definitions.Row], place: str, result: str
) -> dict[str, Any]:
    return {
        "study": settings.study, "task": settings.task, "rows": list(rows), "text": definitions.markdown(rows),
        "table": f"{place}{TABLE}", "result": result,
    }  # fmt: skip


def _run_random_keys(settings: ReproduceSettings, say: LogCallback) -> dict[str, Any]:
    """5,000 random keys on each seed's unmarked network, pooled beside the exact binomial."""
    if settings.fixed:
        raise SettingsError("thresholds embeds nothing, so no setting of it can be fixed", field="fixed")
    storage = open_storage(settings.storage, endpoint=settings.endpoint)
    name = (
        settings.resume
        or settings.run
        or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    )
    folder = storage.child(RUNS).child(name)
    if settings.resume is None:
        storage.check_writable()
        if not folder.write("settings.json", dump(settings), if_absent=True):
            raise SettingsError(f"{name!r} exists; choose another name, or --resume {name}", field="run")
    else:
        settings = _resumed(settings, folder, name)
    say(f"run {name}; if it is interrupted: --resume {name}")
    found: dict[str, list[float]] = {head: [] for head in settings.heads.split(",")}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        config = {"task": settings.task, "model": settings.model, "width": settings.width, "seed": seed}
        base_weights = parse_safetensors(
            train_shared_clean_model(Cell(config, settings.data, settings.download), folder)
        )
        say(f"seed {seed} · phase 1 is done: the unmarked network")
        for head, all_of_them in found.items():
            kept = f"{head}-{seed}-{_GUESSES}"
            done = json.loads(folder.read(kept, _LIMIT)) if folder.exists(kept) else []

            def tick(some: list[float], about: str = f"seed {seed} · {head} head", kept: str = kept) -> None:
                folder.write(kept, json.dumps(some).encode())
                say(f"{about} · {len(some):,} of {settings.keys:,} keys")

            here = random_keys.random_key_accuracies(
                settings.model_copy(update={"seed": seed}), head, base_weights, done=done, tick=tick
            )
            folder.write(kept, json.dumps(here).encode())
            all_of_them += here
    rows = [
        {
            "head": head,
            "seeds": settings.seeds,
            **random_keys.compare_with_binomial(some, 1024 if head == "keyed" else 600),
        }
        for head, some in found.items()
    ]
    place = folder.child(TABLE).uri.removesuffix(TABLE)
    answer = _study_result(settings, rows, place, folder.child("result.json").uri)
    write_manifest_folder(folder, {**_files(rows), "result.json": json.dumps(answer, indent=1).encode()})
    folder.delete(CLEAN)
    return answer


def _resumed(settings: ReproduceSettings, folder: Storage, name: str) -> ReproduceSettings:
    if not folder.exists("settings.json"):
        raise SettingsError(f"no run {name!r} in this storage; check --storage and the name", field="resume")
    if folder.exists(MANIFEST):
        raise SettingsError(f"run {name!r} is finished; its result lies in {folder.uri}", field="resume")
    try:
        kept = ReproduceSettings.of(json.loads(folder.read("settings.json", 2**20)))
    except (ValueError, TypeError, SettingsError):
        raise ArtifactError(f"settings.json of run {name!r} is no study's", field="resume") from None
    for field in sorted(settings.model_fields_set - CHANGEABLE):
        if getattr(settings, field) != getattr(kept, field):
            raise SettingsError(
                f"is {getattr(kept, field)} in run {name!r}; leave it out, or start a new run",
                field=field.replace("_", "-"),
            )
    return kept.model_copy(update={f: getattr(settings, f) for f in settings.model_fields_set & CHANGEABLE})
