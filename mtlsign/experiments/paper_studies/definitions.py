"""The paper's studies, repeated with seeds and spread: Fig. 5, Table 3, the band of random guesses, and ours:
the table of attacks and the controls of R_DA.

All but the band are sweeps (`sweep_run`) over a few settings; here is what they consist of and how their rows
become tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.reports.formatting import number

Row = dict[str, Any]

_DEFAULT_COPIES = EmbedSettings.model_fields["snapshots"].default

#: NP and FP of the paper prune neurons ("unnecessary", "dormant"), here channels; weights are for comparison.
PRUNING = {"channels": ("prune_channels", "fine_prune_channels"), "weights": ("prune", "fine_prune")}
#: Pruning's path: Fig. 5 (ii) asks for the first ratio that takes the mark below γ.
RATIOS = tuple(round(0.1 * i, 1) for i in range(1, 10))
GAMMA = 0.7
#: λ1 and λ2 where they are on: the middle of the paper's grid.
LAMBDA_ON = 0.1

#: Table 3 of the paper: decrease of f_WM's accuracy in points after 50, 150, 250 and 350 epochs.
PAPER_TABLE_3 = {
    "mnist": {50: 1.0, 150: 1.5, 250: 1.5, 350: 2.0},
    "fashion-mnist": {50: 2.0, 150: 2.5, 250: 2.5, 350: 2.5},
    "cifar10": {50: 4.5, 150: 4.5, 250: 4.5, 350: 4.5},
    "cifar100": {50: 0.0, 150: 0.5, 250: 0.9, 350: 0.9},
}


def sweep_settings(settings: ReproduceSettings) -> SweepSettings:
    """The sweep that a study consists of (all but `thresholds`); of a resumed one, only what is said anew."""
    values = {name: getattr(settings, name) for name in _SHARED if getattr(settings, name) is not None}
    derived = {"fixed": _fixed(settings), "attacks": attacks(settings), "num_samples": settings.seeds}
    if settings.resume is not None:
        said = settings.model_fields_set
        values = {name: value for name, value in values.items() if name in said}
        sources = {
            "fixed": {"fixed", "heads"}, "attacks": {"attacks", "epochs", "units"}, "num_samples": {"seeds"},
        }  # fmt: skip
        derived = {name: value for name, value in derived.items() if said & sources[name]}
    space = f"mtlsign.experiments.paper_studies.definitions:{settings.study}_space"
    return SweepSettings.of({**values, **derived, "space": space, "json": settings.json_output})


_SHARED = (
    *("owner", "passphrase_file", "endpoint", "quiet", "task", "data", "download", "model", "width"),
    *("workers", "cpus_per_worker", "gpus_per_worker", "storage", "run", "resume", "seed"),
)


def _fixed(settings: ReproduceSettings) -> str:
    heads = f"head={settings.heads}" if "," not in settings.heads else ""
    return ",".join(part for part in (heads, settings.fixed) if part)


def ablation_space() -> dict[str, Any]:
    """Each regulariser on or off, R_DA as the paper has it (copies tuned on D'), for both heads."""
    switch = {"grid_search": [0.0, LAMBDA_ON]}
    return {
        "head": {"grid_search": ["free", "keyed"]},
        "snapshots": "tuned",
        "lambda1": switch,
        "lambda2": switch,
    }


def overwriting_space() -> dict[str, Any]:
    """The paper's regularisers, for both heads."""
    heads = {"grid_search": ["free", "keyed"]}
    return {"head": heads, "snapshots": "tuned", "lambda1": LAMBDA_ON, "lambda2": LAMBDA_ON}


def attacks_space() -> dict[str, Any]:
    """The defaults with and without R_DA, for both heads."""
    return {"head": {"grid_search": ["keyed", "free"]}, "lambda2": {"grid_search": [1.0, 0.0]}}


def controls_space() -> dict[str, Any]:
    """What each kind of copy in R_DA does: all but the last take two watermark gradients a step; with noise 0
    the copy is the model itself.
    """
    kinds: list[Row] = [{"snapshots": kind} for kind in ("tuned", "noise", "pruned", _DEFAULT_COPIES)]
    itself = {"snapshots": "noise", "noise": 0.0}
    return {"head": "keyed", "arm": {"grid_search": [*kinds, itself, {"lambda2": 0.0}]}}


#: The table of docs/attacks.md: every attack of the catalogue but `average`, which needs further copies.
TABLE = (
    "ftll,ftal:lr=quarter/full,rtll,rtal,annealed,prune:ratio=0.3/0.5/0.7,prune:ratio=0.7,bn=recalibrated,"
    "prune_channels:ratio=0.3,prune_until:points=10,prune_until:points=10,bn=recalibrated,fine_prune:ratio=0.5,"
    "fine_prune_channels:ratio=0.3,overwrite:epochs=50/350,images=256,spoil:steps=20/60/200,"
    "scrub:steps=40/100/300,fresh_early:stages=1/2/3,noise:sigma=0.2/0.4,int8,int4,bn_gauge,bn_fold,scale_rows,"
    "scale_inner,scale_stream,permute_channels:which=inner/both,transpose_input,negate_input,forge_head"
)
#: What the controls of R_DA meet.
CONTROLS = "ftal:lr=quarter/full,annealed,prune:ratio=0.6,fine_prune:ratio=0.5,spoil:steps=60,scrub:steps=40"


def attacks(settings: ReproduceSettings) -> str:
    """What every embedding of the study meets."""
    if settings.study == "ablation":
        np, fp = PRUNING[settings.units]
        return f"{np}:ratio={'/'.join(f'{r:g}' for r in RATIOS)},{fp}:ratio=0.5"
    if settings.attacks is not None:
        return settings.attacks
    if settings.study != "overwriting":
        return TABLE if settings.study == "attacks" else CONTROLS
    heads = settings.heads.split(",")
    return ",".join(f"overwrite:epochs={settings.epochs},head={head}" for head in heads)


# -- the paper's tables --------------------------------


def table(settings: ReproduceSettings, rows: Sequence[Row]) -> list[Row]:
    """The study's table: one row for each setting with mean and standard deviation over seeds."""
    finished = [row for row in rows if row["status"] == "ok"]
    if settings.study == "overwriting":
        task = finished[0].get("task", settings.task) if finished else settings.task
        return _overwriting(finished, str(task))
    return _ablation(finished) if settings.study == "ablation" else _attacked(finished)


def _groups(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def _mean_and_sd(name: str, values: Sequence[float | None]) -> Row:
    kept = [value for value in values if value is not None]
    return {
        name: statistics.fmean(kept) if kept else None,
        f"sd {name}": statistics.stdev(kept) if len(kept) > 1 else None,
    }


def _ablation(rows: Sequence[Row]) -> list[Row]:
    found = []
    for (head, a, b), group in sorted(_groups(rows, ("head", "lambda1", "lambda2")).items()):
        fell = [points_at_gamma(row) for row in group]
        # A mark that never falls below γ counts with what the last ratio costs: a lower bound.
        pruned = [
            points_lost_at_ratio(row, RATIOS[-1]) if x is None else x
            for row, x in zip(group, fell, strict=True)
        ]
        found.append(
            {
                "head": head, "R_func": a > 0, "R_DA": b > 0, "n": len(group),
                **_mean_and_sd("primary", [row["primary_marked"] for row in group]),
                **_mean_and_sd("points lost until NP takes the mark below gamma", pruned),
                "NP never does": fell.count(None),
                **_mean_and_sd("wm accuracy after FP", [_after_fp(row) for row in group]),
            }
        )  # fmt: skip
    return found


def points_at_gamma(row: Mapping[str, Any]) -> float | None:
    """Points that the first pruning ratio costs at which the mark's accuracy is below γ; None if none is."""
    for ratio in RATIOS:
        accuracy = _pruned(row, "wm", ratio)
        if accuracy is not None and accuracy < GAMMA:
            return points_lost_at_ratio(row, ratio)
    return None


def points_lost_at_ratio(row: Mapping[str, Any], ratio: float) -> float | None:
    """Points that pruning at `ratio` costs."""
    return _pruned(row, "points lost", ratio)


def _pruned(row: Mapping[str, Any], what: str, ratio: float) -> float | None:
    found = [number(row.get(_column(row, f"{what} {name} ratio={ratio:g}"))) for name, _ in PRUNING.values()]
    return next((value for value in found if value is not None), None)


def _after_fp(row: Mapping[str, Any]) -> float | None:
    found = [number(row.get(_column(row, f"wm {name} ratio=0.5"))) for _, name in PRUNING.values()]
    return next((accuracy for accuracy in found if accuracy is not None), None)


def _column(row: Mapping[str, Any], start: str) -> str:
    return next((name for name in row if name == start or name.startswith(start + " ")), start)


def _overwriting(rows: Sequence[Row], task: str) -> list[Row]:
    found = []
    papers = PAPER_TABLE_3.get(task.partition("@")[0], {})
    for (head,), group in sorted(_groups(rows, ("head",)).items()):
        columns = [name for name in group[0] if name.startswith("wm overwrite ")]
        for column in columns:
            words = dict(word.split("=", 1) for word in column.split() if "=" in word)
            epochs = int(words["epochs"])
            falls = [100 * (row["wm_accuracy"] - row[column]) for row in group if row.get(column) is not None]
            bits = [number(row.get("bits " + column.removeprefix("wm "))) for row in group]
            found.append(
                {
                    "owner's head": head, "adversary's head": words.get("head"), "epochs": epochs,
                    "n": len(falls), **_mean_and_sd("points of wm accuracy lost", falls),
                    "the paper": papers.get(epochs), **_mean_and_sd("bits left", bits),
                }
            )  # fmt: skip
    return found


def _attacked(rows: Sequence[Row]) -> list[Row]:
    """For every arm and attack: what is left of the mark, and the points that it cost the attacker
    (test part; for `none`, what the mark cost the owner).
    """
    found = []
    for (head, copies), group in _groups([row | variant_of(row) for row in rows], ("head", "R_DA")).items():
        names = [name.removeprefix("wm ") for name in group[0] if name.startswith("wm ")]
        for name in ("none", *names):
            wm, bits = ("wm_accuracy", "evidence_bits") if name == "none" else (f"wm {name}", f"bits {name}")
            left = [row[bits] for row in group if row.get(bits) is not None]
            lost = [
                100 * (row["primary_clean"] - row["primary_marked"])
                if name == "none"
                else row.get(f"points lost {name}")
                for row in group
            ]
            found.append(
                {
                    "head": head, "R_DA": copies, "attack": name, "n": len(left),
                    **_mean_and_sd("wm accuracy", [row.get(wm) for row in group]), **_mean_and_sd("bits", left),
                    "fewest bits": min(left, default=None),
                    **_mean_and_sd("points lost", lost),
                }
            )  # fmt: skip
    return found


def variant_of(row: Mapping[str, Any]) -> Row:
    """The arm of a row: its head, and the copies that R_DA looked at."""
    copies = str(row.get("snapshots", _DEFAULT_COPIES))
    if row["lambda2"] == 0:
        copies = "none"
    elif copies == "noise" and float(row.get("noise", 1)) == 0:
        copies = "the model itself"
    return {"head": row.get("head", "keyed"), "R_DA": copies}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text that docs/results.md can hold: `mean ± sd` in one column."""
    columns = [name for name in rows[0] if not name.startswith("sd ")] if rows else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_told(row, name) for name in columns) + " |")
    return "\n".join(lines)


def _told(row: Mapping[str, Any], name: str) -> str:
    value, sd = row.get(name), number(row.get(f"sd {name}"))
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "with" if value else "without"
    told = f"{value:.4g}" if isinstance(value, float) else str(value)
    return told if sd is None else f"{told} ± {sd:.2g}"
