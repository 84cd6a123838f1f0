"""Repeat the paper's studies: `python jobs/reproduce.py ablation|overwriting|thresholds [--data DATA] …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.reports import console
from mtlsign.reports.embedding_console import EmbedLine


def main(argv: Sequence[str]) -> None:
    """Settings → one call → the paper's table with means and spread, as CSV, Markdown and JSON."""
    named = [f"--study={argv[0]}"] if argv and not argv[0].startswith("-") else []
    settings = cli.parse(ReproduceSettings, [*named, *argv[len(named) :]], description=__doc__ or "")
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0 or settings.study == "thresholds":
        from mtlsign.experiments.paper_studies.run import run_study
        from mtlsign.experiments.sweeps.run import LocalSweepBackend

        result = run_study(settings, fleet=lambda say: LocalSweepBackend(say, line.row), say=line.say)
    else:
        from mtlsign.distributed.tune import study_on_ray

        result = study_on_ray(settings, say=line.say)
    if settings.json_output:
        console.print_json(result)
        return
    print(result["text"])
    print(f"table: {result['table']}\nresult: {result['result']}")


if __name__ == "__main__":
    cli.run(main, resumes=True)
