"""Command `mtlsign reproduce`."""

from __future__ import annotations

from mtlsign.config.cli import Output, job
from mtlsign.config.reproduce import LOCAL_STUDIES, ReproduceSettings
from mtlsign.reports.embedding_console import EmbedLine


@job(ReproduceSettings, positional="study")
def reproduce(settings: ReproduceSettings) -> Output:
    """Repeat a study of the paper: its table with means and spread, as CSV, Markdown and JSON."""
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0 or settings.study in LOCAL_STUDIES:
        from mtlsign.experiments.paper_studies.run import run_study
        from mtlsign.experiments.sweeps.backend import LocalSweepBackend

        result = run_study(settings, make_backend=lambda log: LocalSweepBackend(log, line.row), log=line.log)
    else:
        from mtlsign.distributed.tune import study_on_ray

        result = study_on_ray(settings, log=line.log)
    places = [f"{name}: {result[name]}" for name in ("table", "result", "report") if name in result]
    return Output(result, "\n".join([result["text"], *places]))
