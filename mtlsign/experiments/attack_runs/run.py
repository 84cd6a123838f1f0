"""Attack run: settings in, `attacks.csv` and a report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mtlsign.attacks.expressions import AttackPlan
from mtlsign.config.attack import AttackSettings
from mtlsign.experiments.attack_runs.executor import AttackBackend, plans_with_baseline, run_all
from mtlsign.experiments.attack_runs.pairs import promising_pairs
from mtlsign.experiments.attack_runs.results import MAX_POINTS_LOST, Row, summary_counts
from mtlsign.experiments.attack_runs.run_folder import AttackRun
from mtlsign.experiments.attack_runs.scheme_target import mark_base, prepare_base
from mtlsign.experiments.attack_runs.target import AttackTarget, load_target
from mtlsign.experiments.origin import origin

LogCallback = Callable[[str], None]
RowCallback = Callable[[Row, int, int], None]


def run_attack_job(
    settings: AttackSettings,
    backend: AttackBackend,
    *,
    on_progress: RowCallback = lambda *_: None,
    log: LogCallback = lambda _: None,
) -> dict[str, Any]:
    """Execute the attacks on a backend and store each result immediately, so that the run can be resumed.

    Args:
        settings: the settings.
        backend: executor of the attacks.
        on_progress: called with each finished row, its number and the number of rows.
        log: called with lines for the terminal.

    Returns:
        The content of `result.json`.

    Raises:
        MTLSignError: an input is invalid; then nothing has been written.
    """
    run, settings = AttackRun.open(settings)
    plans = plans_with_baseline(settings.attacks)
    started = f"run {run.name}: {len(plans)} rows; if it is interrupted: {settings.resume_flags(run.name)}"
    if settings.scheme is None:
        target, embedding = load_target(settings), None
        target.model()  # raises before anything is written
        backend.preflight(target)
        run.reserve_name(settings)
        log(started)
    else:
        plan = prepare_base(settings)
        run.reserve_name(settings)
        log(started)
        target, embedding = mark_base(plan, settings, run.folder, log)
        backend.preflight(target)
    finished_rows = run.rows(target)
    if finished_rows:
        log(f"{len(finished_rows)} of them are finished already")
    rows, total = list(finished_rows), len(plans)

    def store_row(row: Row, model: bytes | None) -> Row:
        row = run.save_row(row, model if settings.keep_models else None, target)
        rows.append(row)
        run.write_table(rows)
        on_progress(row, len(rows), total)
        return row

    def run_plans(plans: Sequence[AttackPlan]) -> list[Row]:
        return run_all(target, plans, settings.seed, backend, finished_rows=list(rows), store_row=store_row)

    all_rows = run_plans(plans)
    if settings.pairs:
        pairs = [p for p in promising_pairs(plans, all_rows, settings.pairs) if p not in plans]
        total += len(pairs)
        all_rows = run_plans([*plans, *pairs])
    result = _result(settings, target, all_rows)
    if embedding is not None:
        result |= {"model": f"marked with {settings.scheme}", "embedding": embedding}
    return run.finish(result, all_rows, settings)


def _result(settings: AttackSettings, target: AttackTarget, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "model": settings.model, "kit": settings.kit, "task": target.task,
        "architecture": dict(target.architecture),
        "seed": settings.seed, "split_seed": target.split_seed, "budget": target.extra_data_fraction,
        "lr": target.learning_rate, "bits_required": target.min_evidence_bits,
        "max_points_lost": MAX_POINTS_LOST,
        "public_key": target.public_key, **origin("attack", settings),
        **summary_counts(rows), "rows": list(rows),
    }  # fmt: skip
