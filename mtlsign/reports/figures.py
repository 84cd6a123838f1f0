"""The report's figures: small SVG panels, each drawn from rows as they were recorded.

Small panels rather than one large sheet, so that a phone shows one below the other at a readable size.
Text stays text (selectable, in the page's font); nothing outside the panel is referred to.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mtlsign.reports.formatting import number, wilson, words

Rows = Sequence[Mapping[str, Any]]
Primary = list[tuple[str, float, tuple[float, float] | None]]

BLUE, ORANGE, GREEN, GREY = "#0b5cad", "#c2570c", "#1f7a5a", "#6b7280"
_MAX_POINTS = 800  # per curve: keeps a page of a long run under a few hundred KiB
_MAX_LAYERS = 24
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#374151",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def draw(
    result: Mapping[str, Any], history: Mapping[str, Rows], scores: Mapping[str, Sequence[float]]
) -> dict[str, str]:
    """Draw what the data allow.

    Args:
        result, history, scores: as `mtlsign.reports.embedding.render_report` takes them.

    Returns:
        Panel name -> an ``<svg>`` element with its own text alternative; a panel without data is absent.
    """
    phase1, phase2 = list(history.get("phase1") or ()), list(history.get("phase2") or ())
    clean = {
        name: values
        for name in _SCORE_LOOKS
        if (values := [x for x in map(number, scores.get(name) or ()) if x is not None])
    }
    losses1 = _curves(phase1, "epoch", {"loss": "training loss"})
    names = {"validation_accuracy": "validation", "train_accuracy": "training"}
    accuracies1 = _curves(phase1, "epoch", names)
    names = {"wm_loss": "mark", "snapshot_loss": "mark on snapshots", "distillation_loss": "distillation"}
    losses2 = _curves(phase2, "step", names)
    names = {
        "wm_accuracy": "mark",
        "snapshot_accuracy": "mark on snapshots",
        "validation_accuracy": "task (validation)",
    }
    accuracies2 = _curves(phase2, "step", names)
    layers = _layers(result.get("deviation_by_layer"))
    primary = _primary_values(result)
    drawn: dict[str, str] = {}

    def panel(name: str, data: object, text: Callable[[], str], painter: Callable[[Axes], None]) -> None:
        if data:
            drawn[name] = _svg(name, text(), painter)

    with mpl.rc_context(_STYLE):
        panel("phase1_loss", losses1, lambda: "Phase 1: training loss by epoch.",
              lambda ax: _plot(ax, losses1, "epoch", "loss", log=True))  # fmt: skip
        panel("phase1_accuracy", accuracies1, lambda: "Phase 1: accuracy of the task by epoch.",
              lambda ax: _plot(ax, accuracies1, "epoch", "accuracy", percent=True))  # fmt: skip
        panel("phase2_loss", losses2, lambda: f"Phase 2: loss by step: {', '.join(losses2)}.",
              lambda ax: _plot(ax, losses2, "step", "loss", log=True))  # fmt: skip
        panel("phase2_accuracy", accuracies2, lambda: f"Phase 2: accuracy by step: {', '.join(accuracies2)}.",
              lambda ax: _plot(ax, accuracies2, "step", "accuracy", percent=True))  # fmt: skip
        panel("primary", primary, lambda: _primary_text(primary), lambda ax: _primary(ax, primary))
        panel("scores", clean, lambda: _scores_text(clean), lambda ax: _scores(ax, clean))
        panel("null", clean, lambda: _null_text(clean), lambda ax: _null(ax, clean))
        panel("layers", layers, lambda: f"Change of the parameters in {len(layers)} layers, as L2 norms.",
              lambda ax: _bars(ax, layers))  # fmt: skip
    return drawn


def _svg(
    name: str, text: str, painter: Callable[[Axes], None], size: tuple[float, float] = (4.8, 3.1)
) -> str:
    figure = Figure(figsize=size, layout="constrained")
    painter(figure.add_subplot())
    buffer = io.StringIO()
    # equal data give equal bytes, and ids differ between the panels of one page
    with mpl.rc_context({"svg.hashsalt": f"mtlsign/{name}"}):
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="[0-9. -]+"', svg)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{html.escape(text, quote=True)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def _curves(rows: Rows, x: str, names: Mapping[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for name, label in names.items():
        pairs = [(number(row.get(x)), number(row.get(name))) for row in rows]
        points = [(a, b) for a, b in pairs if a is not None and b is not None]
        if points:
            stride = -(-len(points) // _MAX_POINTS)
            kept = points[::stride] if points[::stride][-1] == points[-1] else [*points[::stride], points[-1]]
            found[label] = ([a for a, _ in kept], [b for _, b in kept])
    return found


def _plot(
    ax: Axes,
    curves: Mapping[str, tuple[list[float], list[float]]],
    x: str,
    y: str,
    *,
    log: bool = False,
    percent: bool = False,
) -> None:
    looks = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))
    for (label, (xs, ys)), (colour, line) in zip(curves.items(), looks, strict=False):
        marker = "o" if len(xs) < 12 else ""
        ax.plot(xs, ys, line, color=colour, label=label, linewidth=1.8, marker=marker, markersize=3.5)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if log and all(value > 0 for _, ys in curves.values() for value in ys):
        ax.set_yscale("log")
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(curves) > 1:
        ax.legend(loc="best")


def _primary_values(result: Mapping[str, Any]) -> Primary:
    samples = number(result.get("primary_samples"))
    found = []
    for label, key in (("before (clean)", "primary_clean"), ("after (marked)", "primary_marked")):
        value = number(result.get(key))
        if value is not None:
            fits = samples is not None and samples >= 1 and 0 <= value <= 1
            found.append((label, value, wilson(value, int(samples)) if fits and samples else None))
    return found


def _primary_text(values: Primary) -> str:
    told = "; ".join(f"{label} {value:.4f}" for label, value, _ in values)
    return f"The task on held-out data: {told}."


def _primary(ax: Axes, values: Primary) -> None:
    shares = all(0 <= value <= 1 for _, value, _ in values)
    for row, ((_, value, interval), colour) in enumerate(zip(values, (GREY, BLUE), strict=False)):
        if interval:
            ax.plot(interval, (row, row), color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55)
        ax.plot([value], [row], "o", color=colour, markersize=8)
        told = f"{value:.2%}" if shares else f"{value:.4g}"
        ax.annotate(told, (value, row), (0, 10), textcoords="offset points", ha="center")
    ax.set_yticks(range(len(values)), [label for label, _, _ in values])
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xlabel("held-out metric" + (", bar = 95 % interval" if any(i for _, _, i in values) else ""))
    if shares:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.margins(x=0.25)


_SCORE_LOOKS = {
    "marked": ("marked", BLUE, "-"),
    "w0": ("unmarked W0", ORANGE, "--"),
    "wrong_key": ("wrong key", GREY, "-."),
}


def _hits(values: Iterable[float]) -> int:
    """Scores that agree with their label; |score| < 1e-4 counts as wrong (design decision 1)."""
    return sum(value >= 1e-4 for value in values)


def _scores_text(scores: Mapping[str, Sequence[float]]) -> str:
    told = "; ".join(
        f"{_SCORE_LOOKS[name][0]} {_hits(row)} of {len(row)} agree" for name, row in scores.items()
    )
    return f"Scores, positive where they agree with the key's label: {told}."


def _scores(ax: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    low = min(min(values) for values in scores.values())
    high = max(max(values) for values in scores.values())
    reach = max(abs(low), abs(high), 1e-6)
    edges = [reach * (i / 24 - 1) for i in range(49)]  # zero is an edge: no bar holds both hits and misses
    for name, values in scores.items():
        label, colour, line = _SCORE_LOOKS[name]
        ax.hist(values, bins=edges, histtype="stepfilled", color=colour, alpha=0.15)
        ax.hist(values, bins=edges, histtype="step", color=colour, linestyle=line, linewidth=1.6, label=label)
    ax.axvline(0, color="#111827", linewidth=0.9)
    ax.set_xlabel("score (positive = agrees with the label)")
    ax.set_ylabel("key samples")
    _legend_above(ax, columns=3)


def _null_text(scores: Mapping[str, Sequence[float]]) -> str:
    n = len(next(iter(scores.values())))
    return f"The null, Binomial({n}, 1/2), and where the counts lie: " + "; ".join(
        f"{_SCORE_LOOKS[name][0]} {_hits(values)}" for name, values in scores.items()
    )


def _null(ax: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    n = len(next(iter(scores.values())))
    counts = list(range(n + 1))
    total = math.lgamma(n + 1) - n * math.log(2)
    chance = [math.exp(total - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in counts]
    ax.fill_between(counts, chance, color=GREY, alpha=0.35, linewidth=0, label="chance")
    for name, values in scores.items():
        label, colour, line = _SCORE_LOOKS[name]
        hits = _hits(values)
        ax.axvline(hits, color=colour, linestyle=line, linewidth=1.8, label=f"{label}: {hits}")
    ax.set_xlim(0, n * 1.02)
    ax.set_ylim(0, 1.15 * max(chance))
    ax.set_xlabel(f"correct of N = {n}")
    ax.set_ylabel("probability under chance")
    _legend_above(ax)


def _legend_above(ax: Axes, columns: int = 2) -> None:
    """A legend outside the axes: the marked count may lie anywhere, so no corner is free for certain."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.3}
    ax.legend(ncols=columns, handlelength=1.6, columnspacing=1.2, **place)


def _layers(value: object) -> list[tuple[str, float]]:
    if not isinstance(value, Mapping):
        return []
    found = [(words(name, 40), size) for name, raw in value.items() if (size := number(raw)) is not None]
    keep = {id(row) for row in sorted(found, key=lambda row: -row[1])[:_MAX_LAYERS]}
    return [row for row in found if id(row) in keep]


def _bars(ax: Axes, layers: Sequence[tuple[str, float]]) -> None:
    places = range(len(layers))
    ax.barh(places, [size for _, size in layers], color=BLUE, height=0.65)
    ax.set_yticks(places)
    size = 10 if len(layers) <= 10 else 7
    # parse_math: a layer may be called anything, also "$x$"
    ax.set_yticklabels([name for name, _ in layers], parse_math=False, fontsize=size)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("L2 norm of the change")
