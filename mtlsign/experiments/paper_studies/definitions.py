"""Studies of the paper as sweeps: their search spaces, attacks and settings.

The studies repeat Fig. 5 (`ablation`), Table 3 (`overwriting`) and the band of random keys of section 4.1
(`random_keys`, which is no sweep) with several seeds. Two more are ours: the table of all attacks (`attacks`)
and the kinds of perturbation in R_DA (`perturbation_ablation`).
"""

from __future__ import annotations

from typing import Any

from mtlsign.config.embed_defaults import FEATURE_DEFAULTS
from mtlsign.config.reproduce import PAPER_STUDIES, ReproduceSettings
from mtlsign.config.sweep import SweepSettings

Row = dict[str, Any]

DEFAULT_KINDS = ",".join(FEATURE_DEFAULTS["perturbation.kinds"])

#: NP and FP of the paper prune neurons ("unnecessary", "dormant"), here channels. Weights are for comparison.
PRUNING = {"channels": ("prune_channels", "fine_prune_channels"), "weights": ("prune", "fine_prune")}
#: Ratios of pruning. Fig. 5 (ii) asks for the first one at which the watermark falls below γ.
RATIOS = tuple(round(0.1 * i, 1) for i in range(1, 10))
#: λ1 and λ2 where they are on: the middle of the paper's grid.
LAMBDA_ON = 0.1
#: The preset `paper`, and the spread head, where both regularisers are on. R_func of the spread head is
#: measured in responses and has its default weight; its R_DA is off by default, here it is on.
PAPER_ON: Row = {"preset": "paper", "head": "free", "lambda1": LAMBDA_ON, "lambda2": LAMBDA_ON}
SPREAD_ON: Row = {"head": "spread", "lambda1": 3.0, "lambda2": 1.0}

#: All attacks of docs/attacks.md except `average_models`, which needs other marked models.
ALL_ATTACKS = ",".join(
    (
        "ftll",
        "ftal:lr=quarter/full",
        "ftdet",
        "rtll",
        "rtal",
        "retrain",
        "prune:ratio=0.3/0.5/0.7",
        "prune:ratio=0.7,bn=recalibrated",
        "prune_channels:ratio=0.3",
        "prune_to_accuracy_drop:points=10",
        "prune_to_accuracy_drop:points=10,bn=recalibrated",
        "fine_prune:ratio=0.5",
        "fine_prune_channels:ratio=0.3",
        "overwrite:epochs=50/350,images=256",
        "spoil:steps=20/60/200",
        "decorrelate:steps=40/100/300",
        "reinit_early_layers:stages=1/2/3",
        "tune:steps=500/1500,lr=0.01",
        "tune:steps=1500,lr=0.01,weight_decay=0.005",
        "relearn:epochs=20",
        "extract",
        "transfer",
        "adversarial_training",
        "label_smoothing",
        "regularize",
        "shift_weights",
        "neural_cleanse",
        "preprocess_input",
        "remove_outputs",
        "null_space:energy=0.97,noise=1",
        "null_space:energy=0.9,noise=1,repair_steps=300,repair_lr=0.003",
        "response_noise:size=0.3,repair_steps=300,repair_lr=0.003",
        "mean_shift:size=0.1",
        "low_rank:share=0.25,repair_steps=300,repair_lr=0.003",
        "noise:sigma=0.2/0.4",
        "int8",
        "int4",
        "bn_reparameterize",
        "bn_fold",
        "scale_filters",
        "scale_inner_channels",
        "scale_residual_channels",
        "recurrent_symmetries",
        "permute_vocabulary",
        "attention_symmetries",
        "rotate_stream",
        "dummy_block",
        "reorder_joint_matrices",
        "mix_linear_channels",
        "lora_tune:rank=8/64",
        "prune_activations:ratio=0.5",
        "drop_layers:last=1",
        "merge_models:weight=0.5",
        "subtract_public_base:mode=scale/prune/low_rank",
        "permute_channels:which=inner/both",
        "transpose_input",
        "negate_input",
        "mix_input:kind=negate",
        "turn_input",
        "dummy_channels",
        "split_channels",
        "clique_channels",
        "rewrite_file:form=weight_norm",
        "unsketch",
        "ambiguity_trained_head",
    )
)
#: Attacks of the study `perturbation_ablation`.
ABLATION_ATTACKS = (
    "ftal:lr=quarter/full,retrain,prune:ratio=0.6,fine_prune:ratio=0.5,spoil:steps=60,decorrelate:steps=40"
)

_SHARED_SETTINGS = (
    *(
        "owner",
        "passphrase_file",
        "endpoint",
        "quiet",
        "task",
        "data",
        "download",
        "tokenizer",
        "model",
        "width",
    ),
    *("workers", "cpus_per_worker", "gpus_per_worker", "storage", "run", "resume", "seed"),
)


def sweep_settings(settings: ReproduceSettings, *, stored_space: str | None = None) -> SweepSettings:
    """Return the settings of the sweep that a study consists of (all studies but `random_keys`).

    For a resumed study only the settings given explicitly are passed on; the others are those of its run.

    Args:
        settings: the settings.
        stored_space: the space of the run to resume, which determines its heads.
    """
    values = {name: getattr(settings, name) for name in _SHARED_SETTINGS}
    values = {name: value for name, value in values.items() if value is not None}
    derived = {"set": _overrides(settings), "attacks": attacks(settings), "num_samples": settings.seeds}
    if settings.resume is not None:
        explicit = settings.model_fields_set
        values = {name: value for name, value in values.items() if name in explicit}
        sources = {
            "set": {"overrides", "heads"},
            "attacks": {"attacks", "epochs", "units"},
            "num_samples": {"seeds"},
        }
        derived = {name: value for name, value in derived.items() if explicit & sources[name]}
    space = _space_name(settings)
    if stored_space is not None and "heads" not in settings.model_fields_set:
        is_of_study = stored_space.startswith(f"{__name__}:{settings.study}_")
        space = stored_space if is_of_study else space
    return SweepSettings.of({**values, **derived, "space": space, "json": settings.json_output})


def _overrides(settings: ReproduceSettings) -> list[str]:
    if "," in settings.heads or settings.heads == "paper":
        return list(settings.overrides)
    return [f"head={settings.heads}", *settings.overrides]


def _space_name(settings: ReproduceSettings) -> str:
    """Return the name of the function below that makes a study's space.

    The studies of the paper have further spaces for the preset `paper` and the spread head, whose settings
    differ from those of the other heads.
    """
    name = str(settings.study)
    if name in PAPER_STUDIES:
        heads = settings.heads.split(",")
        name += "".join(f"_{head}" for head in ("paper", "spread") if head in heads)
    return f"{__name__}:{name}_space"


def ablation_space() -> dict[str, Any]:
    """Return the space of Fig. 5: each regulariser on or off, for both heads; R_DA fine-tunes on D'."""
    switch = {"grid_search": [0.0, LAMBDA_ON]}
    return {
        "head": {"grid_search": ["free", "keyed"]},
        "perturbation.kinds": "fine_tuned",
        "lambda1": switch,
        "lambda2": switch,
    }


def ablation_paper_space() -> dict[str, Any]:
    """Return the space of Fig. 5 for the preset `paper`."""
    return _variants(_switched(PAPER_ON))


def ablation_spread_space() -> dict[str, Any]:
    """Return the space of Fig. 5 for the spread head."""
    return _variants(_switched(SPREAD_ON))


def ablation_paper_spread_space() -> dict[str, Any]:
    """Return the space of Fig. 5 for the preset `paper` and the spread head."""
    return _variants([*_switched(PAPER_ON), *_switched(SPREAD_ON)])


def _switched(variant: Row) -> list[Row]:
    """Return a variant with each regulariser on or off."""
    return [
        {**variant, "lambda1": variant["lambda1"] * r_func, "lambda2": variant["lambda2"] * r_da}
        for r_func in (0, 1)
        for r_da in (0, 1)
    ]


def _variants(variants: list[Row]) -> dict[str, Any]:
    return {"variant": {"grid_search": variants}}


def overwriting_space() -> dict[str, Any]:
    """Return the space of Table 3: the paper's regularisers, for both heads."""
    heads = {"grid_search": ["free", "keyed"]}
    return {"head": heads, "perturbation.kinds": "fine_tuned", "lambda1": LAMBDA_ON, "lambda2": LAMBDA_ON}


def overwriting_paper_space() -> dict[str, Any]:
    """Return the space of Table 3 for the preset `paper`."""
    return _variants([PAPER_ON])


def overwriting_spread_space() -> dict[str, Any]:
    """Return the space of Table 3 for the spread head with its defaults."""
    return {"head": "spread"}


def overwriting_paper_spread_space() -> dict[str, Any]:
    """Return the space of Table 3 for the preset `paper` and the spread head with its defaults."""
    return _variants([PAPER_ON, {"head": "spread"}])


def attacks_space() -> dict[str, Any]:
    """Return the space of the attack table: the defaults with and without R_DA, for both heads."""
    return {"head": {"grid_search": ["keyed", "free"]}, "lambda2": {"grid_search": [1.0, 0.0]}}


def perturbation_ablation_space() -> dict[str, Any]:
    """Return one variant for each kind of perturbation in R_DA, and two controls.

    All variants but the last compute two watermark gradients in each step. With noise of sigma 0 the copy is
    the model itself.
    """
    kinds: list[Row] = [
        {"perturbation.kinds": kind} for kind in ("fine_tuned", "noise", "pruned", DEFAULT_KINDS)
    ]
    unperturbed = {"perturbation.kinds": "noise", "perturbation.noise_sigma": 0.0}
    return {"head": "keyed", "variant": {"grid_search": [*kinds, unperturbed, {"lambda2": 0.0}]}}


def attacks(settings: ReproduceSettings) -> str:
    """Return the attack expressions that a study runs on every embedding."""
    if settings.study == "ablation":
        np, fp = PRUNING[settings.units]
        return f"{np}:ratio={'/'.join(f'{ratio:g}' for ratio in RATIOS)},{fp}:ratio=0.5"
    if settings.attacks is not None:
        return settings.attacks
    if settings.study != "overwriting":
        return ALL_ATTACKS if settings.study == "attacks" else ABLATION_ATTACKS
    heads = settings.heads.split(",")
    if {"paper", "spread"} & set(heads):
        return f"overwrite:epochs={settings.epochs}"  # the attacker has the owner's head
    return ",".join(f"overwrite:epochs={settings.epochs},head={head}" for head in heads)
