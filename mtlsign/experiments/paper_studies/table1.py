"""Table 1 of the paper: the security requirements that each scheme meets, judged by measurements.

The paper judges nine schemes and its own by argument. Here a false claim on the unmarked network stands for
unambiguity, the accuracy that the mark costs for functionality, the four tunings of the paper for robustness,
and an embedding of a few steps into networks of other tasks for flexibility.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mtlsign.config.attack import AttackSettings
from mtlsign.errors import DataError, ModelError, SettingsError
from mtlsign.experiments.attack_runs.scheme_target import prepare_base, untrained_base
from mtlsign.experiments.paper_studies.paper_values import TABLE_1
from mtlsign.experiments.paper_studies.scheme_tables import Row, by_scheme, mean_and_sd, points_of_embedding
from mtlsign.experiments.paper_studies.tables import with_all_columns
from mtlsign.schemes import SchemeSettings
from mtlsign.watermark.embedding.worker import SingleProcessContext

#: Tunings of the paper: of the last layer or all layers, and the same with a new last layer.
TABLE1_ATTACKS = "ftll,ftal,rtll,rtal"
#: Further kinds of tasks on which flexibility is tried: task -> settings of a small network.
FLEXIBILITY_TASKS: Mapping[str, Mapping[str, Any]] = {
    "sst2@0.05": {},
    "camvid@0.1": {"network": "cascade-resnet18", "width": 16},
    "gan-digits": {},
}
#: Largest mean loss of accuracy, in points, with which a mark counts as preserving the function.
FUNCTION_POINTS = 1.0
_STEPS, _BATCH = 2, 8


def tasks_that_run(settings: AttackSettings) -> dict[str, dict[str, Any]]:
    """Embed a few steps into an untrained network of each further kind of task.

    Args:
        settings: settings of an attack run with the scheme; task and network are replaced.

    Returns:
        Task -> `runs` (None if its data are missing) and the `reason` why it does not run.
    """
    return {task: _attempt(settings, task, small) for task, small in FLEXIBILITY_TASKS.items()}


def _attempt(settings: AttackSettings, task: str, small: Mapping[str, Any]) -> dict[str, Any]:
    named = {"network": None, "width": None, "overrides": ()} | dict(small)
    try:
        plan = prepare_base(settings.updated({"task": task, **named}))
    except DataError as error:
        return {"runs": None, "reason": error.detail}
    except SettingsError as error:
        if error.field != "scheme":
            raise
        return {"runs": False, "reason": error.detail}
    model, loaded, device = untrained_base(plan)
    options = SchemeSettings(_STEPS, _BATCH, plan.settings.phase1.lr or 0.1, settings.seed)
    try:
        with torch.random.fork_rng(devices=[]):
            key = plan.scheme.generate_key(model, loaded, settings.seed)
            plan.scheme.embed(model, loaded, key, options, SingleProcessContext(device))
    except ModelError as error:
        return {"runs": False, "reason": error.detail}
    return {"runs": True, "reason": None}


def requirement_table(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each scheme: the measured quantity and the judgement of each requirement.

    A requirement is met (`yes`) if in no seed a false claim, or the owner's on the unmarked network, is
    accepted; if the mark costs at most a point on average; if every tuning of every seed leaves an accepted
    claim; if the scheme runs on every kind of task whose data are there. Columns `paper` have the judgements
    of Table 1, if it lists the scheme.
    """
    rows: list[Row] = []
    for scheme, group in by_scheme(results).items():
        finished = [result for result in group if result["status"] == "ok"]
        if finished:
            rows.append(_requirements(scheme, finished))
        else:
            rows.append({"scheme": scheme, "n": 0, "reason": group[0].get("reason")})
    return with_all_columns(rows)


def _requirements(scheme: str, finished: Sequence[Mapping[str, Any]]) -> Row:
    forged = sum(bool(result["forgery"] and result["forgery"]["accepted"]) for result in finished)
    unmarked = sum(bool(result["embedding"]["unmarked"]["accepted"]) for result in finished)
    drop = mean_and_sd("points lost by the mark", map(points_of_embedding, finished))
    tuned = [
        row
        for result in finished
        for row in result["rows"]
        if row["attack"] != "none" and row["status"] == "ok"
    ]
    weakest = min(tuned, key=lambda row: (bool(row["accepted"]), row["evidence_bits"]), default=None)
    attempts: Mapping[str, Any] = next((result["tasks"] for result in finished if result["tasks"]), {})
    outcomes = [attempt["runs"] for attempt in attempts.values() if attempt["runs"] is not None]
    judged = {
        "unambiguity": not forged and not unmarked,
        "functionality": drop["points lost by the mark"] <= FUNCTION_POINTS,
        "robustness": bool(weakest["accepted"]) if weakest else None,
        "flexibility": all(outcomes) if outcomes else None,
    }
    embedding, published = finished[0]["embedding"], TABLE_1.get(scheme, {})
    reasons = [f"{task}: {attempt['reason']}" for task, attempt in attempts.items() if attempt["reason"]]
    return {
        "scheme": scheme, "n": len(finished), "access": embedding["access"],
        "needs a commitment": _tick(embedding["needs_commitment"]), "false claims accepted": forged,
        "unmarked accepted": unmarked,
        **drop,
        "fewest bits before": min(result["embedding"]["marked"]["evidence_bits"] for result in finished),
        "fewest bits after tuning": weakest["evidence_bits"] if weakest else None,
        "weakest under": f"{weakest['attack']} {weakest['parameters']}".strip() if weakest else None,
        "tasks that run": f"{sum(outcomes)} of {len(outcomes)}",
        **{name: _tick(is_met) for name, is_met in judged.items()},
        **{f"paper {name}": _tick(published.get(name)) for name in judged},
        "reason": "; ".join(reasons) or None,
    }  # fmt: skip


def _tick(is_met: bool | None) -> str | None:
    return None if is_met is None else "yes" if is_met else "no"
