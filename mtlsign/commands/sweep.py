"""Command `mtlsign sweep`."""

from __future__ import annotations

from typing import Any

from mtlsign.config.cli import Output, job
from mtlsign.config.sweep import SweepSettings
from mtlsign.reports import console
from mtlsign.reports.embedding_console import EmbedLine

_MEASURES = ("drop_points", "wm_accuracy", "evidence_bits_attacked", "deviation_l2")


@job(SweepSettings)
def sweep(settings: SweepSettings) -> Output:
    """Embed over a grid of settings, attack every cell and recommend one.

    Without a combination to recommend, the exit code is 3.
    """
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.experiments.sweeps.backend import LocalSweepBackend
        from mtlsign.experiments.sweeps.run import run_sweep_job

        result = run_sweep_job(settings, LocalSweepBackend(line.log, line.row), log=line.log)
    else:
        from mtlsign.distributed.tune import sweep_on_ray

        result = sweep_on_ray(settings, log=line.log)
    return Output(result, _summary(result), problem=_problem(result, settings))


def _problem(result: dict[str, Any], settings: SweepSettings) -> str | None:
    """Return the reason why no combination is recommended, with the fix; None if one is."""
    if result["recommended"] is not None:
        return None
    reason = f"The sweep recommends nothing: {result['why']}."
    if result["try_again"]:
        return f"{reason} Retry the failed cells with {settings.resume_flags(result['run'])}."
    if not result["groups"]:
        return f"{reason} Read the column reason of {result['csv']}."
    return f"{reason} With --force, a new sweep recommends the best of the rejected combinations."


def _summary(result: dict[str, Any]) -> str:
    """Return the recommended cell and the places of the files."""
    best = result["recommended"] or {}
    names = [name for name in (*result["vary"], *_MEASURES) if name in best]
    return "\n".join(
        (
            console.table([(name, _text(best[name])) for name in names]),
            f"{'recommended' if best else 'no recommendation'}: {result['why']}",
            f"table: {result['csv']}",
            f"report: {result['report']}",
            f"result: {result['result']}",
        )
    )


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
