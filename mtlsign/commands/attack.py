"""Command `mtlsign attack`."""

from __future__ import annotations

from mtlsign.config.attack import AttackSettings
from mtlsign.config.cli import Output, job


@job(AttackSettings)
def attack(settings: AttackSettings) -> Output | None:
    """Attack a marked model and verify what remains. `--attacks list` prints the attacks."""
    from mtlsign.reports import attack_console

    if settings.attacks.strip() == "list":
        from mtlsign.attacks import describe

        attack_console.print_catalogue(describe(), as_json=settings.json_output)
        return None
    from mtlsign.experiments.attack_runs.run import run_attack_job

    line = attack_console.AttackLine(quiet=settings.quiet or settings.json_output)
    if settings.workers == 0:
        from mtlsign.experiments.attack_runs.executor import LocalAttackBackend

        result = run_attack_job(settings, LocalAttackBackend(line.tick), on_progress=line.row, log=line.log)
    else:
        from mtlsign.distributed.attacks import attack_on_ray

        result = attack_on_ray(settings, on_progress=line.row, log=line.log, on_waiting=line.waiting)
    return Output(result, attack_console.summary(result))
