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
    s = cli.parse(AttackSettings, argv, description=__doc__ or "")
    from mtlsign.reports import attack_console

    if s.attacks.strip() == "list":
        from mtlsign.attacks import describe

        attack_console.print_catalogue(describe(), as_json=s.json_output)
        return
    from mtlsign.experiments.attack_runs.run import run

    line = attack_console.AttackLine(quiet=s.quiet or s.json_output)
    if s.workers == 0:
        from mtlsign.experiments.attack_runs.executor import InTurn

        done = run(s, InTurn(line.tick), show=line.row, say=line.say)
    else:
        from mtlsign.distributed.attacks import attack_on_ray

        done = attack_on_ray(s, show=line.row, say=line.say, waiting=line.waiting)
    if s.json_output:
        console.print_json(done)
    else:
        print(attack_console.summary(done))


if __name__ == "__main__":
    cli.run(main, resumes=True)
