"""Property inference: can a classifier of weights detect that a network carries a mark, without the key?

Two groups of networks are trained from different seeds. The networks of the first group stay unmarked: as
trained, and tuned without a watermark for as many steps as an embedding takes, once with the SGD of the
comparators and once with an Adam of the rate with which the spread head is embedded. A further control runs
phase 2 of the spread head without the losses of the key's bits: with distillation, R_func and frozen batch
norms. Those of the second group are marked, each with a key of its seed. Further rows show what the
classifier makes of two unmarked groups, and of tuning alone. Features of finished networks are stored, so
that an interrupted study repeats none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import learning_rates
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.attack_runs.results import Row
from mtlsign.experiments.attack_runs.scheme_target import (
    base_tensors,
    mark_base,
    prepare_base,
    train_base_without_mark,
    tune_base,
)
from mtlsign.experiments.paper_studies.scheme_studies import (
    SchemeStudyRun,
    attack_settings_of,
    scheme_names,
)
from mtlsign.experiments.paper_studies.weight_features import separation, weight_features
from mtlsign.schemes.base import SchemeSettings
from mtlsign.schemes.training import Optimizer
from mtlsign.storage.base import Storage
from mtlsign.storage.safetensors_io import parse_safetensors

LogCallback = Callable[[str], None]
Result = dict[str, Any]

#: Groups without a mark: as trained, and trained further for as many steps as an embedding takes.
UNMARKED, TUNED, TUNED_ADAM, PHASE2 = "unmarked", "tuned", "tuned_adam", "phase2_without_mark"
_WITHOUT_MARK = (UNMARKED, TUNED, TUNED_ADAM, PHASE2)
#: Scheme with whose settings the networks without a mark are prepared; it changes no layer.
_PLAIN_SCHEME = "uchida"
#: Steps of every embedding and of the tuning by default.
DEFAULT_STEPS = 200


def run_property_inference(settings: ReproduceSettings, log: LogCallback) -> tuple[SchemeStudyRun, list[Row]]:
    """Train the networks, mark one group with every scheme, and classify.

    Args:
        settings: settings of the study; `seeds` is the number of networks in each group.
        log: called with lines for the terminal.

    Returns:
        The run, which is not committed yet, and the rows of its table.

    Raises:
        SettingsError: a scheme cannot mark the network.
    """
    run, settings = SchemeStudyRun.open(settings)
    names = scheme_names(settings)
    run.reserve_name(settings)
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    first = range(settings.seed, settings.seed + settings.seeds)
    second = range(first.stop, first.stop + settings.seeds)
    networks = [
        (UNMARKED, first),
        (UNMARKED, second),
        *((group, first) for group in _WITHOUT_MARK[1:]),
        *((name, second) for name in names),
    ]
    results: dict[str, dict[int, Result]] = {}
    for group, seeds in networks:
        for seed in seeds:
            result = run.stored(group, seed)
            if result is None:
                result = _network(settings, group, seed, run.base_folder(seed))
                run.store(group, seed, result)
            log(f"seed {seed} · {group}")
            results.setdefault(group, {})[seed] = result
    return run, _table(names, results, first, second)


def _network(settings: ReproduceSettings, group: str, seed: int, folder: Storage) -> Result:
    """Return the features of one network, and of a marked one its evidence."""
    scheme = _PLAIN_SCHEME if group in _WITHOUT_MARK else group
    attack_settings = attack_settings_of(settings, scheme, seed)
    steps = settings.embed_steps or DEFAULT_STEPS
    plan = prepare_base(attack_settings)
    if group == UNMARKED:
        return {"features": weight_features(base_tensors(plan, folder))}
    if group in _WITHOUT_MARK:
        tuning = SchemeSettings(steps, attack_settings.embed_batch, plan.settings.phase1.lr or 0.1, seed)
        if group == PHASE2:
            return {"features": weight_features(train_base_without_mark(plan, tuning, folder))}
        return {
            "features": weight_features(tune_base(plan, tuning, folder, _optimizer(group, settings.width)))
        }
    target, embedding = mark_base(plan, _with_steps(attack_settings, steps), folder, lambda _: None)
    return {"features": weight_features(parse_safetensors(target.tensors)), "embedding": embedding}


def _optimizer(group: str, width: int | None) -> Optimizer:
    """Return the comparators' SGD, or Adam with the rate of phase 2 and no weight decay."""
    if group == TUNED:
        return Optimizer()
    return Optimizer("adam", learning_rates(width or 16)[1], 0.0)


def _with_steps(settings: AttackSettings, steps: int) -> AttackSettings:
    return settings.model_copy(update={"embed_steps": steps})


def _table(
    names: Sequence[str], results: dict[str, dict[int, Result]], first: range, second: range
) -> list[Row]:
    """Return a row for each pair of groups; the second group of a pair has other seeds than the first."""

    def features(group: str, seeds: range) -> list[list[float]]:
        return [results[group][seed]["features"] for seed in seeds]

    pairs = [(UNMARKED, group) for group in _WITHOUT_MARK]
    pairs += [(name, against) for name in names for against in _WITHOUT_MARK]
    rows: list[Row] = []
    for group, against in pairs:
        value = separation(features(against, first), features(group, second))
        marked = [results[group][seed].get("embedding") for seed in second]
        rows.append(
            {
                "group": group, "against": against, "n": value.n, "correct": value.correct,
                "accuracy": value.accuracy, "low": value.low, "high": value.high,
                "accepted": sum(bool(one["marked"]["accepted"]) for one in marked if one is not None),
                "of": sum(one is not None for one in marked),
            }
        )  # fmt: skip
    return rows
