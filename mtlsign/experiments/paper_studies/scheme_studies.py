"""Studies of several schemes on the same networks: the attack table, Table 1, Fig. 6, and false claims.

Every scheme marks the same unmarked network of a seed, with the same number of steps if one is given. The
result of each scheme and seed is stored, so that an interrupted study repeats none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtlsign.config.attack import AttackSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import ArtifactError, DivergedError, ModelError, SettingsError
from mtlsign.experiments.attack_runs.executor import plans_with_baseline, run_attack
from mtlsign.experiments.attack_runs.results import Row, compare_with_baseline
from mtlsign.experiments.attack_runs.run_folder import BASE_FILE
from mtlsign.experiments.attack_runs.scheme_target import forge_on_base, mark_base, prepare_base
from mtlsign.experiments.paper_studies.scheme_tables import false_claim_table, fig6_table, scheme_table
from mtlsign.experiments.paper_studies.table1 import TABLE1_ATTACKS, requirement_table, tasks_that_run
from mtlsign.reports.attack_console import format_result
from mtlsign.schemes import SCHEMES
from mtlsign.schemes.detection import DEFAULT_EVIDENCE_BITS
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.run_folder import RunFolder

LogCallback = Callable[[str], None]

#: Attacks of the table that finish within minutes on a small network.
SCHEME_ATTACKS = (
    "ftal:lr=full,retrain,prune:ratio=0.5,fine_prune:ratio=0.5,prune_channels:ratio=0.3,int8,"
    "noise:sigma=0.4,low_rank:share=0.25,overwrite:epochs=50,spoil:steps=60,null_space:energy=0.97,noise=1,"
    "adversarial_training,label_smoothing,regularize,shift_weights,neural_cleanse,preprocess_input,"
    "remove_outputs,extract,extract:network=small,transfer,relearn:epochs=20,scale_filters,scale_inner_channels,"
    "scale_residual_channels,bn_fold,permute_channels:which=both"
)
#: Attacks of Fig. 6: fine-pruning, pruning of neurons and spoiling.
FIG6_ATTACKS = (
    "fine_prune_channels:ratio=0.5,prune_channels:ratio=0.1/0.2/0.3/0.4/0.5/0.6/0.7/0.8/0.9,"
    "spoil:steps=20/60/200"
)
_ATTACKS = {"schemes": SCHEME_ATTACKS, "fig6": FIG6_ATTACKS, "table1": TABLE1_ATTACKS}
_RESULTS, _LIMIT = "schemes", 2**24
_TABLES: Mapping[str, Callable[[Sequence[Row]], list[Row]]] = {
    "schemes": scheme_table,
    "fig6": fig6_table,
    "false_claims": false_claim_table,
    "table1": requirement_table,
}


class SchemeStudyRun(RunFolder[ReproduceSettings]):
    """Run folder of such a study: the network of each seed, and the result of each scheme and seed."""

    settings_class = ReproduceSettings
    kind = "a study"

    def stored(self, scheme: str, seed: int) -> dict[str, Any] | None:
        """Return a finished result. Raises `ArtifactError` if its file is damaged."""
        name = f"{_RESULTS}/{scheme}-{seed}.json"
        if not self.folder.exists(name):
            return None
        try:
            return read_json_object(self.folder.read(name, _LIMIT), name, limit=_LIMIT)
        except ArtifactError:
            raise ArtifactError(
                f"{name} of run {self.name!r} is damaged. Delete it; its scheme is then repeated.",
                field="resume",
            ) from None

    def store(self, scheme: str, seed: int, result: Mapping[str, Any]) -> None:
        """Store a finished result."""
        self.folder.write(f"{_RESULTS}/{scheme}-{seed}.json", json.dumps(result).encode())

    def base_folder(self, seed: int) -> Storage:
        """Return the folder of the unmarked network of a seed."""
        return self.folder.child(f"base-{seed}")

    def delete_leftovers(self) -> None:
        """Delete the unmarked networks; the results of the schemes stay."""
        for name in self.folder.list():
            if name.endswith(f"/{BASE_FILE}"):
                self.folder.delete(name)


def scheme_names(settings: ReproduceSettings) -> list[str]:
    """Return the schemes of a study. Raises `SettingsError` for an unknown name."""
    if settings.schemes == "all":
        return list(SCHEMES)
    names = [name.strip() for name in settings.schemes.split(",")]
    for name in names:
        if name not in SCHEMES:
            raise SettingsError(
                f"Unknown scheme {name[:60]!r}. Use all, or some of {', '.join(SCHEMES)}.", field="schemes"
            )
    return names


def run_scheme_study(settings: ReproduceSettings, log: LogCallback) -> tuple[SchemeStudyRun, list[Row]]:
    """Mark, attack or forge with every scheme and seed.

    Args:
        settings: settings of the study; its name is one of `SCHEME_STUDIES`.
        log: called with lines for the terminal.

    Returns:
        The run, which is not committed yet, and the rows of its table.
    """
    run, settings = SchemeStudyRun.open(settings)
    names = scheme_names(settings)
    run.reserve_name(settings)
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    results = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in names:
            result = run.stored(name, seed)
            if result is None:
                result = _result(settings, name, seed, run.base_folder(seed), log)
                run.store(name, seed, result)
            log(f"seed {seed} · {name} · {result['status']}")
            results.append(result)
    return run, _TABLES[settings.study](results)


def attack_settings_of(settings: ReproduceSettings, scheme: str, seed: int) -> AttackSettings:
    """Return the settings of an attack run that marks its own network with a scheme."""
    values = {
        "task": settings.task, "data": settings.data, "tokenizer": settings.tokenizer,
        "network": settings.model, "width": settings.width, "embed_steps": settings.embed_steps,
        "set": settings.overrides or None,
    }  # fmt: skip
    return AttackSettings.of(
        {
            "scheme": scheme,
            "seed": seed,
            "download": settings.download,
            "embed_batch": settings.embed_batch,
            "min_evidence_bits": DEFAULT_EVIDENCE_BITS,
            **{key: value for key, value in values.items() if value is not None},
        }
    )


def _result(
    settings: ReproduceSettings, name: str, seed: int, folder: Storage, log: LogCallback
) -> dict[str, Any]:
    """Return the result of one scheme and seed; its `status` is "ok", "not_supported" or "diverged"."""
    attack_settings = attack_settings_of(settings, name, seed)
    header = {"scheme": name, "seed": seed}
    try:
        plan = prepare_base(attack_settings)
    except SettingsError as error:
        if error.field != "scheme":
            raise
        return {**header, "status": "not_supported", "reason": error.detail}
    if settings.study == "false_claims":
        return {**header, "status": "ok", "forgery": forge_on_base(plan, seed, folder)}
    try:
        target, embedding = mark_base(
            plan, attack_settings, folder, lambda text: log(f"seed {seed} · {name} · {text}")
        )
    except ModelError as error:
        status = "diverged" if isinstance(error, DivergedError) else "not_supported"
        return {**header, "status": status, "reason": error.detail}
    plans = plans_with_baseline(settings.attacks or _ATTACKS[settings.study])
    rows: list[Row] = []
    for number, attack_plan in enumerate(plans, 1):
        row = run_attack(target, attack_plan, seed).row
        rows.append(compare_with_baseline(row, (rows or [row])[0], target.min_evidence_bits))
        log(f"seed {seed} · {name} · {number}/{len(plans)} {format_result(rows[-1])}")
    embedding["epochs"] = embedding["images"] / plan.task.size("train")
    result = {**header, "status": "ok", "embedding": embedding, "rows": rows}
    if settings.study == "table1":
        result["forgery"] = forge_on_base(plan, seed, folder)
        own = {settings.task: {"runs": True, "reason": None}}
        result["tasks"] = own | tasks_that_run(attack_settings) if seed == settings.seed else None
    return result
