"""Figures of the embedding report: training curves, task accuracy, watermark scores, changes by layer.

Each figure is small, so that a narrow screen shows one below the other at a readable size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mtlsign.reports.formatting import number, wilson, words
from mtlsign.reports.plotting import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Axes,
    MaxNLocator,
    PercentFormatter,
    add_legend_above,
    render_svg,
)

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, tuple[list[float], list[float]]]
Scores = Mapping[str, Sequence[float]]
#: Label, value and 95 % interval of the task's metric.
Primary = list[tuple[str, float, tuple[float, float] | None]]

_MAX_POINTS = 800  # per curve: keeps a page of a long run under a few hundred KiB
_MAX_LAYERS = 24
_LOSS_1 = {"loss": "training loss"}
_ACCURACY_1 = {"validation_accuracy": "validation", "train_accuracy": "training"}
_LOSS_2 = {
    "wm_loss": "watermark", "snapshot_loss": "watermark, perturbed model",
    "distillation_loss": "distillation",
}  # fmt: skip
_ACCURACY_2 = {
    "wm_accuracy": "watermark", "snapshot_accuracy": "watermark, perturbed model",
    "validation_accuracy": "task (validation)",
}  # fmt: skip


def draw(result: Mapping[str, Any], history: Mapping[str, Rows], scores: Scores) -> dict[str, str]:
    """Draw every figure whose data are present.

    Args:
        result: fields of ``result.json``, as `mtlsign.reports.embedding.render_embedding_report` takes them.
        history: rows of phases 1 and 2, as above.
        scores: scores of the key's bits, as above.

    Returns:
        Figure name -> an ``<svg>`` element with its text alternative.
    """
    phase1, phase2 = list(history.get("phase1") or ()), list(history.get("phase2") or ())
    finite_scores = {
        name: values
        for name in _SCORE_STYLES
        if (values := [x for x in map(number, scores.get(name) or ()) if x is not None])
    }
    layers = _layers(result.get("deviation_by_layer"))
    primary = _primary_values(result)
    figures: dict[str, str] = {}

    def add(
        name: str,
        data: object,
        description: Callable[[], str],
        painter: Callable[[Axes], None],
        height: float = 3.1,
    ) -> None:
        if data:
            figures[name] = render_svg(name, description(), painter, size=(4.8, height))

    def add_curves(
        name: str, title: str, rows: Rows, x: str, labels: Mapping[str, str], **axis: bool
    ) -> None:
        curves = _curves(rows, x, labels)
        y = "accuracy" if axis.get("percent") else "loss"
        names = "" if len(labels) == 1 else f": {', '.join(curves)}"
        add(name, curves, lambda: f"{title}{names}.", lambda ax: _plot(ax, curves, x, y, **axis))

    add_curves("phase1_loss", "Phase 1: training loss by epoch", phase1, "epoch", _LOSS_1, log=True)
    add_curves(
        "phase1_accuracy", "Phase 1: task accuracy by epoch", phase1, "epoch", _ACCURACY_1, percent=True
    )
    add_curves("phase2_loss", "Phase 2: loss by step", phase2, "step", _LOSS_2, log=True)
    add_curves("phase2_accuracy", "Phase 2: accuracy by step", phase2, "step", _ACCURACY_2, percent=True)
    add("primary", primary, lambda: _primary_description(primary), lambda ax: _draw_primary(ax, primary))
    add("scores", finite_scores, lambda: _score_description(finite_scores),
        lambda ax: _draw_scores(ax, finite_scores))  # fmt: skip
    add("null", finite_scores, lambda: _null_description(finite_scores),
        lambda ax: _draw_null(ax, finite_scores))  # fmt: skip
    add("layers", layers, lambda: f"Change of the parameters in {len(layers)} layers, as L2 norms.",
        lambda ax: _draw_layers(ax, layers), height=max(3.1, 0.8 + 0.2 * len(layers)))  # fmt: skip
    return figures


def _curves(rows: Rows, x: str, labels: Mapping[str, str]) -> Curves:
    """Return label -> (xs, ys) for each column that has numbers, thinned out to `_MAX_POINTS`."""
    curves = {}
    for name, label in labels.items():
        pairs = [(number(row.get(x)), number(row.get(name))) for row in rows]
        points = [(a, b) for a, b in pairs if a is not None and b is not None]
        if points:
            thinned = points[:: -(-len(points) // _MAX_POINTS)]
            if thinned[-1] != points[-1]:
                thinned.append(points[-1])
            curves[label] = ([a for a, _ in thinned], [b for _, b in thinned])
    return curves


def _plot(ax: Axes, curves: Curves, x: str, y: str, *, log: bool = False, percent: bool = False) -> None:
    styles = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))
    for (label, (xs, ys)), (colour, line) in zip(curves.items(), styles, strict=False):
        marker = "o" if len(xs) < 12 else ""
        ax.plot(xs, ys, line, color=colour, label=label, linewidth=1.8, marker=marker, markersize=3.5)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if log and all(value > 0 for _, ys in curves.values() for value in ys):
        ax.set_yscale("log")
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(curves) > 1:
        ax.legend(loc="best")


def _primary_values(result: Mapping[str, Any]) -> Primary:
    samples = number(result.get("primary_samples")) if result.get("primary_is_mean", True) else None
    values = []
    for label, key in (("before (clean)", "primary_clean"), ("after (marked)", "primary_marked")):
        value = number(result.get(key))
        if value is not None:
            is_share = samples is not None and samples >= 1 and 0 <= value <= 1
            values.append((label, value, wilson(value, int(samples)) if is_share and samples else None))
    return values


def _primary_description(values: Primary) -> str:
    listed = "; ".join(f"{label} {value:.4f}" for label, value, _ in values)
    return f"Task metric on held-out data: {listed}."


def _draw_primary(ax: Axes, values: Primary) -> None:
    shares = all(0 <= value <= 1 for _, value, _ in values)
    for row, ((_, value, interval), colour) in enumerate(zip(values, (GREY, BLUE), strict=False)):
        if interval:
            ax.plot(interval, (row, row), color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55)
        ax.plot([value], [row], "o", color=colour, markersize=8)
        text = f"{value:.2%}" if shares else f"{value:.4g}"
        ax.annotate(text, (value, row), (0, 10), textcoords="offset points", ha="center")
    ax.set_yticks(range(len(values)), [label for label, _, _ in values])
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xlabel("held-out metric" + (", bar = 95 % interval" if any(i for _, _, i in values) else ""))
    if shares:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.margins(x=0.25)
    if shares:  # an axis beyond 0 … 100 % would suggest impossible accuracies
        left, right = ax.get_xlim()
        ax.set_xlim(max(left, -0.03), min(right, 1.03))


_SCORE_STYLES = {
    "marked": ("marked", BLUE, "-"),
    "w0": ("unmarked W0", ORANGE, "--"),
    "wrong_key": ("wrong key", GREY, "-."),
}


def _matches(values: Iterable[float]) -> int:
    """Count the scores that agree with their label; a score within 1e-4 of zero counts as wrong."""
    return sum(value >= 1e-4 for value in values)


def _score_description(scores: Scores) -> str:
    listed = "; ".join(
        f"{_SCORE_STYLES[name][0]} {_matches(row)} of {len(row)} agree" for name, row in scores.items()
    )
    return f"Scores, positive where they agree with the key's label: {listed}."


def _draw_scores(ax: Axes, scores: Scores) -> None:
    low = min(min(values) for values in scores.values())
    high = max(max(values) for values in scores.values())
    reach = max(abs(low), abs(high), 1e-6)
    edges = [reach * (i / 24 - 1) for i in range(49)]  # zero is an edge: no bar holds both signs
    for name, values in scores.items():
        label, colour, line = _SCORE_STYLES[name]
        ax.hist(values, bins=edges, histtype="stepfilled", color=colour, alpha=0.15)
        ax.hist(values, bins=edges, histtype="step", color=colour, linestyle=line, linewidth=1.6, label=label)
    ax.axvline(0, color="#111827", linewidth=0.9)
    ax.set_xlabel("score (positive = agrees with the key)")
    ax.set_ylabel("bits of the key")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    add_legend_above(ax, columns=3)


def _null_description(scores: Scores) -> str:
    n = len(next(iter(scores.values())))
    counts = "; ".join(f"{_SCORE_STYLES[name][0]} {_matches(values)}" for name, values in scores.items())
    return f"Distribution of matches by chance, Binomial({n}, 1/2), and the measured counts: {counts}"


def _draw_null(ax: Axes, scores: Scores) -> None:
    n = len(next(iter(scores.values())))
    counts = list(range(n + 1))
    total = math.lgamma(n + 1) - n * math.log(2)
    chance = [math.exp(total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in counts]
    ax.fill_between(counts, chance, color=GREY, alpha=0.35, linewidth=0, label="chance")
    for name, values in scores.items():
        label, colour, line = _SCORE_STYLES[name]
        matches = _matches(values)
        ax.axvline(matches, color=colour, linestyle=line, linewidth=1.8, label=f"{label}: {matches}")
    ax.set_xlim(0, n * 1.02)
    ax.set_ylim(0, 1.15 * max(chance))
    ax.set_xlabel(f"matching bits of N = {n}")
    ax.set_ylabel("probability under chance")
    add_legend_above(ax)


def _layers(value: object) -> list[tuple[str, float]]:
    """Return the layers that changed most, in the order of the result, which is that of the network."""
    if not isinstance(value, Mapping):
        return []
    layers = [(words(name, 40), size) for name, raw in value.items() if (size := number(raw)) is not None]
    largest = {id(row) for row in sorted(layers, key=lambda row: -row[1])[:_MAX_LAYERS]}
    return [row for row in layers if id(row) in largest]


def _draw_layers(ax: Axes, layers: Sequence[tuple[str, float]]) -> None:
    places = range(len(layers))
    ax.barh(places, [size for _, size in layers], color=BLUE, height=0.65)
    ax.set_yticks(places)
    size = 10 if len(layers) <= 10 else 9
    # A user's layer may have any name, also one like "$x$" that Matplotlib would read as a formula.
    ax.set_yticklabels([name for name, _ in layers], parse_math=False, fontsize=size)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("L2 norm of the change")
