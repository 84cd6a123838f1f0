"""Sweep λ1 and λ2: `python jobs/sweep.py --space smoke|paper_grid …`, also by `ray job submit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # own spaces, tasks and models are found from where the job was started
    sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.sweep import SweepSettings
from mtlsign.reports import console
from mtlsign.reports.embedding_console import EmbedLine


def main(argv: Sequence[str]) -> None:
    """Settings → one call → cells.csv, report.html, result.json."""
    settings = cli.parse(SweepSettings, argv, description=__doc__ or "")
    line = EmbedLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.experiments.sweeps.run import LocalSweepBackend, run

        result = run(settings, LocalSweepBackend(line.say, line.row), say=line.say)
    else:
        from mtlsign.distributed.tune import sweep_on_ray

        result = sweep_on_ray(settings, say=line.say)
    if settings.json_output:
        console.print_json(result)
        return
    best = result["recommended"] or {}
    print(console.table([(name, _text(best[name])) for name in (*result["vary"], *_SHOWN) if name in best]))
    print(f"recommended: {result['why']}")
    print(f"table: {result['csv']}\nreport: {result['report']}\nresult: {result['result']}")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


_SHOWN = ("drop_points", "wm_accuracy", "evidence_bits_attacked", "deviation_l2")

if __name__ == "__main__":
    cli.run(main, resumes=True)
