"""Study of Zhong et al. 2020: a new label for key samples, and an old one as in Zhang et al. 2018.

Its panels show the accuracy on the test part and on new key samples by the share of key samples (alpha), by
the size of the perturbation (beta), and by the ratio of pruning. Its table has both before and after
fine-tuning. Every embedding starts from the unmarked network of its seed. Both methods have the same images,
perturbation and steps, and differ in the label alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.attack_runs.executor import plans_with_baseline, run_attack
from mtlsign.experiments.attack_runs.results import Row
from mtlsign.experiments.attack_runs.scheme_target import mark_base, prepare_base
from mtlsign.experiments.paper_studies.paper_values import new_label_values
from mtlsign.experiments.paper_studies.scheme_studies import SchemeStudyRun, attack_settings_of
from mtlsign.experiments.paper_studies.scheme_tables import mean_and_sd
from mtlsign.storage.base import Storage

LogCallback = Callable[[str], None]

METHODS = {"new": "new label (Zhong et al.)", "old": "old label (Zhang et al.)"}
#: Values of the panels. The paper's axes have no printed values.
ALPHAS, BETAS = (0.001, 0.01, 0.05), (0.1, 0.2, 0.4)
#: Beta of the alpha panel; alpha of the beta panel, which is the paper's, or the larger one if the paper's
#: gives fewer than `_FEW_SAMPLES` key samples. Pruning and fine-tuning have both.
BETA, PAPER_ALPHA, LARGER_ALPHA = 0.2, 0.001, 0.05
_FEW_SAMPLES = 40
#: Attacks at that setting.
ATTACKS = "prune:ratio=0.1/0.3/0.5/0.7/0.8/0.9,ftal"
#: Key samples in a training batch.
_IN_BATCH = 16


@dataclass(frozen=True)
class Setting:
    """Setting of an embedding.

    Attributes:
        label: "new" or "old".
        alpha: key samples for training as a share of the training images.
        beta: size of the perturbation as a share of the range of pixel values.
        is_attacked: True for the setting of pruning and fine-tuning.
    """

    label: str
    alpha: float
    beta: float
    is_attacked: bool = False

    @property
    def name(self) -> str:
        """Name of the stored result."""
        return f"{self.label}-{self.alpha:g}-{self.beta:g}"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the scheme."""
        return (
            f"label={self.label}", f"training_share={self.alpha}", f"intensity={self.beta}",
            f"in_batch={_IN_BATCH}", "min_training_samples=1",
        )  # fmt: skip


def panel_settings(images: int) -> list[Setting]:
    """Return all settings for both labels: that of the attacks, then those of the alpha and beta panels.

    Args:
        images: number of training images.
    """
    centre = PAPER_ALPHA if PAPER_ALPHA * images >= _FEW_SAMPLES else LARGER_ALPHA
    alphas = [(alpha, BETA) for alpha in ALPHAS if alpha >= centre or alpha * images >= _FEW_SAMPLES]
    pairs = dict.fromkeys([(centre, BETA), *alphas, *((centre, beta) for beta in BETAS)])
    return [
        Setting(label, alpha, beta, is_attacked=(alpha, beta) == (centre, BETA))
        for alpha, beta in pairs
        for label in METHODS
    ]


def run_new_label_study(settings: ReproduceSettings, log: LogCallback) -> tuple[SchemeStudyRun, list[Row]]:
    """Mark the network of each seed with every setting; prune and fine-tune at one of them.

    Args:
        settings: settings of the study.
        log: called with lines for the terminal.

    Returns:
        The run, which is not committed yet, and the rows of its table.
    """
    run, settings = SchemeStudyRun.open(settings)
    run.reserve_name(settings)
    log(f"run {run.name}; if it is interrupted: {settings.resume_flags(run.name)}")
    results = []
    images = prepare_base(attack_settings_of(settings, "new_label", settings.seed)).task.size("train")
    for setting in panel_settings(images):
        for seed in range(settings.seed, settings.seed + settings.seeds):
            result = run.stored(setting.name, seed)
            if result is None:
                result = _result(settings, setting, seed, run.base_folder(seed), log)
                run.store(setting.name, seed, result)
            log(f"seed {seed} · {setting.name} · {result['normal']:.3f} normal · {result['key']:.3f} key")
            results.append(result)
    return run, new_label_table(results, settings.task)


def _result(
    settings: ReproduceSettings, setting: Setting, seed: int, folder: Storage, log: LogCallback
) -> dict[str, Any]:
    """Return the accuracies of one embedding, and the rows of its attacks."""
    attack_settings = attack_settings_of(settings, "new_label", seed)
    attack_settings = attack_settings.model_copy(update={"scheme_options": setting.options})
    target, embedding = mark_base(
        prepare_base(attack_settings), attack_settings, folder,
        lambda text: log(f"seed {seed} · {setting.name} · {text}"),
    )  # fmt: skip
    rows: list[Row] = []
    plans = plans_with_baseline(settings.attacks or ATTACKS)[1:] if setting.is_attacked else []
    for number, plan in enumerate(plans, 1):
        rows.append(run_attack(target, plan, seed).row)
        log(f"seed {seed} · {setting.name} · attack {number} of {len(plans)}: {rows[-1]['attack']}")
    marked = embedding["marked"]
    return {
        "label": setting.label, "alpha": setting.alpha, "beta": setting.beta, "seed": seed,
        "unmarked": embedding["primary_clean"], "normal": embedding["primary_marked"],
        "key": marked["matched"] / marked["n"], "rows": rows,
    }  # fmt: skip


def new_label_table(results: Sequence[dict[str, Any]], task: str) -> list[Row]:
    """Return the rows of the panels and of the table: accuracies in per cent, mean and sd over seeds.

    Args:
        results: results of all embeddings; those at the setting of the attacks have their rows.
        task: name of the task, which selects the paper's values.
    """
    centre = next(result["alpha"] for result in results if result["rows"])
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["alpha"], result["beta"]), []).append(result)
    rows = []
    for label in METHODS:
        own = {key[1:]: group for key, group in groups.items() if key[0] == label}
        for panel, chosen in (("alpha", [pair for pair in own if pair[1] == BETA]),
                              ("beta", [pair for pair in own if pair[0] == centre])):  # fmt: skip
            for pair in sorted(chosen):
                rows.append(_row(panel, pair[panel == "beta"], label, own[pair]))
        rows += _attack_rows(label, own.get((centre, BETA), []), task)
    return rows


def _attack_rows(label: str, group: Sequence[dict[str, Any]], task: str) -> list[Row]:
    """Return the rows of pruning, and those before and after fine-tuning with the paper's values."""
    if not group:
        return []
    rows = []
    for index, first in enumerate(group[0]["rows"]):
        cells = [
            {"normal": row["primary_after"], "key": row["wm_accuracy"]}
            for row in (result["rows"][index] for result in group)
            if row["status"] == "ok"
        ]
        rows.append(_row(first["attack"], first["parameters"], label, cells))
    before, after = new_label_values(task, label)
    rows.append(_row("before fine-tuning", "", label, group, before))
    for row in rows:
        if row["panel"] == "ftal" and after:
            row["paper: normal"], row["paper: key"] = after
    return rows


def _row(
    panel: str, value: float | str, label: str, cells: Sequence[dict[str, Any]],
    paper: tuple[float, float] | None = None,
) -> Row:  # fmt: skip
    return {
        "panel": panel, "value": value, "method": METHODS[label], "n": len(cells),
        **mean_and_sd("normal", (100 * cell["normal"] for cell in cells)),
        **mean_and_sd("key", (100 * cell["key"] for cell in cells)),
        "paper: normal": paper and paper[0], "paper: key": paper and paper[1],
    }  # fmt: skip
