"""Attack a marked model: `python jobs/attack.py --model PLACE --kit KIT [--attacks list|fast|all|…]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # own tasks and models are found from where the job was started
    sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.attack import AttackSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → one call → attacks.csv and a report."""
    settings = cli.parse(AttackSettings, argv, description=__doc__ or "")
    from mtlsign.reports import attack_console

    if settings.attacks.strip() == "list":
        from mtlsign.attacks import describe

        attack_console.print_catalogue(describe(), as_json=settings.json_output)
        return
    from mtlsign.experiments.attack_runs.run import run

    line = attack_console.AttackLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.experiments.attack_runs.executor import LocalAttackBackend

        done = run(settings, LocalAttackBackend(line.tick), show=line.row, say=line.say)
    else:
        from mtlsign.distributed.attacks import attack_on_ray

        done = attack_on_ray(settings, show=line.row, say=line.say, waiting=line.waiting)
    if settings.json_output:
        console.print_json(done)
    else:
        print(attack_console.summary(done))


if __name__ == "__main__":
    cli.run(main, resumes=True)
