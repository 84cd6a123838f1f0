"""The paper's studies, repeated with seeds and spread: Fig. 5, Table 3, and the band of random guesses.

The first two are sweeps (`sweep_run`) over a few settings with the attacks that the paper names; here is what
they consist of and how their rows become the paper's tables.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mtlsign import embedding, null
from mtlsign.backbone import build
from mtlsign.figures import number
from mtlsign.key import Identity
from mtlsign.network import TaskShape, cpu_state, graph_of
from mtlsign.settings import EmbedSettings
from mtlsign.settings_reproduce import ReproduceSettings
from mtlsign.settings_sweep import SweepSettings
from mtlsign.tasks import load_task
from mtlsign.verification import Probe, agreement

Row = dict[str, Any]

#: Magnitude pruning's path: Fig. 5 (ii) asks for the first ratio that takes the mark below γ.
RATIOS = tuple(round(0.1 * i, 1) for i in range(1, 10))
GAMMA = 0.7
#: λ1 and λ2 where they are on: the middle of the paper's grid.
ON = 0.1

#: Table 3 of the paper: decrease of f_WM's accuracy in points after 50, 150, 250 and 350 epochs.
TABLE_3 = {
    "mnist": {50: 1.0, 150: 1.5, 250: 1.5, 350: 2.0},
    "fashion-mnist": {50: 2.0, 150: 2.5, 250: 2.5, 350: 2.5},
    "cifar10": {50: 4.5, 150: 4.5, 250: 4.5, 350: 4.5},
    "cifar100": {50: 0.0, 150: 0.5, 250: 0.9, 350: 0.9},
}


def sweep_settings(s: ReproduceSettings) -> SweepSettings:
    """The sweep that a study consists of (`ablation`, `overwriting`)."""
    values = {name: getattr(s, name) for name in _SHARED if getattr(s, name) is not None}
    return SweepSettings.of(
        {
            **values, "space": f"mtlsign.reproduce:{s.study}_space", "fixed": _fixed(s),
            "attacks": attacks(s), "num_samples": s.seeds, "json": s.json_output,
        }
    )  # fmt: skip


_SHARED = (
    *("owner", "passphrase_file", "endpoint", "quiet", "task", "data", "download", "model", "width"),
    *("workers", "cpus_per_worker", "gpus_per_worker", "storage", "run", "resume", "seed"),
)


def _fixed(s: ReproduceSettings) -> str:
    heads = f"head={s.heads}" if "," not in s.heads else ""
    return ",".join(part for part in (heads, s.fixed) if part)


def ablation_space() -> dict[str, Any]:
    """Each regulariser on or off, R_DA as the paper has it (copies tuned on D'), for both heads."""
    switch = {"grid_search": [0.0, ON]}
    return {
        "head": {"grid_search": ["free", "keyed"]},
        "snapshots": "tuned",
        "lambda1": switch,
        "lambda2": switch,
    }


def overwriting_space() -> dict[str, Any]:
    """The paper's regularisers, for both heads."""
    heads = {"grid_search": ["free", "keyed"]}
    return {"head": heads, "snapshots": "tuned", "lambda1": ON, "lambda2": ON}


def attacks(s: ReproduceSettings) -> str:
    """What every embedding of the study meets."""
    if s.study == "ablation":
        return f"prune:ratio={'/'.join(f'{r:g}' for r in RATIOS)},fine_prune:ratio=0.5"
    heads = s.heads.split(",")
    return ",".join(f"overwrite:epochs={s.epochs},head={head}" for head in heads)


# -- the paper's tables --------------------------------


def table(s: ReproduceSettings, rows: Sequence[Row]) -> list[Row]:
    """The study's table: one row for each setting with mean and standard deviation over seeds."""
    finished = [row for row in rows if row["status"] == "ok"]
    return _ablation(finished) if s.study == "ablation" else _overwriting(finished, s.task)


def _groups(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def _spread(name: str, values: Sequence[float | None]) -> Row:
    kept = [value for value in values if value is not None]
    return {
        name: statistics.fmean(kept) if kept else None,
        f"sd {name}": statistics.stdev(kept) if len(kept) > 1 else None,
    }


def _ablation(rows: Sequence[Row]) -> list[Row]:
    found = []
    for (head, a, b), group in sorted(_groups(rows, ("head", "lambda1", "lambda2")).items()):
        pruned = [points_at_gamma(row) for row in group]
        found.append(
            {
                "head": head, "R_func": a > 0, "R_DA": b > 0, "n": len(group),
                **_spread("primary", [row["primary_marked"] for row in group]),
                **_spread("points lost until NP takes the mark below gamma", pruned),
                "NP never does": pruned.count(None),
                **_spread("wm accuracy after FP", [_after_fp(row) for row in group]),
            }
        )  # fmt: skip
    return found


def points_at_gamma(row: Mapping[str, Any]) -> float | None:
    """Points that the first pruning ratio costs at which the mark's accuracy is below γ; None if none is."""
    for ratio in RATIOS:
        accuracy = number(row.get(_column(row, f"wm prune ratio={ratio:g}")))
        if accuracy is not None and accuracy < GAMMA:
            return number(row.get(_column(row, f"points lost prune ratio={ratio:g}")))
    return None


def _after_fp(row: Mapping[str, Any]) -> float | None:
    return number(row.get(_column(row, "wm fine_prune ratio=0.5")))


def _column(row: Mapping[str, Any], start: str) -> str:
    return next((name for name in row if name == start or name.startswith(start + " ")), start)


def _overwriting(rows: Sequence[Row], task: str) -> list[Row]:
    found = []
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
                    "n": len(falls), **_spread("points of wm accuracy lost", falls),
                    "the paper": TABLE_3.get(task, {}).get(epochs), **_spread("bits left", bits),
                }
            )  # fmt: skip
    return found


# -- the band of random guesses --------------------------------


def guesses(
    s: ReproduceSettings, head: str, w0: Mapping[str, torch.Tensor], *, done: Sequence[float] = (),
    tick: Callable[[list[float]], None] = lambda _: None,
) -> list[float]:  # fmt: skip
    """Accuracies of `s.keys` random keys on an unmarked network; a free head is untrained, as in the paper.

    `done` are accuracies of an interrupted call; `tick` gets the list every 100 keys.
    """
    e = EmbedSettings.of(
        {"task": s.task, "data": s.data, "model": s.model, "width": s.width, "head": head, "seed": s.seed,
         "insecure_test_key": True}
    ).resolved()  # fmt: skip
    task = load_task(e.task, data=e.data, download=s.download, seed=e.seed)
    graph = graph_of(e, TaskShape(task.channels, task.height, task.width, task.classes))
    network = build(graph)
    network.load_state_dict(dict(w0))
    owner = Identity(bytes(31) + b"\x01", bytes(32))
    geometry = (task.channels, task.height, task.width)
    opening, reference = embedding.commit(build(graph), cpu_state(network), graph, geometry, e, owner)
    probe = Probe(opening, reference)
    found = list(done)
    tensors = cpu_state(network)
    for index in range(len(found), s.keys):
        other = probe.control(index)
        scores, _ = other.scores(tensors)
        assert scores is not None, "an unmarked network of the spec's own architecture can be read"
        found.append(float(agreement(scores, other.labels).float().mean()))
        if len(found) % 100 == 0:
            tick(found)
    return found


def band(accuracies: Sequence[float], n: int) -> Row:
    """Random guesses beside the exact binomial: mean, sd, extremes, and a χ² test of the counts."""
    from scipy import stats

    counts = [round(a * n) for a in accuracies]
    keys = len(counts)
    low, high = null.wrong_band(n, 1 / keys)
    # Cells of about equal probability, at least 20 keys in each.
    cells = max(2, min(40, keys // 20))
    edges = sorted({int(stats.binom.ppf(i / cells, n, 0.5)) for i in range(1, cells)})
    chances = [float(x) for x in stats.binom.cdf([*edges, n], n, 0.5)]
    expected = [keys * (b - a) for a, b in itertools.pairwise([0.0, *chances])]
    seen = [sum(a < c <= b for c in counts) for a, b in itertools.pairwise([-1, *edges, n])]
    test = stats.chisquare(seen, expected)
    return {
        "keys": keys, "N": n, "mean": statistics.fmean(accuracies),
        "sd of keys": statistics.pstdev(accuracies),
        "sd of Binomial(N, 1/2)": math.sqrt(0.25 / n), "lowest": min(accuracies), "highest": max(accuracies),
        "one key in all is expected outside": f"{low / n:.4f} ... {high / n:.4f}",
        "the paper's band": "0.425 ... 0.575 (N = 600, 5,000 keys)",
        "chi square": float(test.statistic), "degrees of freedom": len(seen) - 1, "p": float(test.pvalue),
    }  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as text that docs/log.md can hold: `mean ± sd` in one column."""
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
