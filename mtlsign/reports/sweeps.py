"""What an owner reads after a sweep: heat maps over λ1 × λ2, the front, the recommended cell, every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes

from mtlsign.reports import figures
from mtlsign.reports.figures import BLUE, GREY, ORANGE
from mtlsign.reports.formatting import number, words

#: What the heat maps show: field of a group, title, how a number is written, and whether more is better.
_MAPS = (
    ("drop_points", "Points of validation accuracy lost", "{:.2f}", False),
    ("wm_accuracy", "Share of the bits right", "{:.3f}", True),
    ("evidence_bits_attacked", "Fewest bits left after an attack", "{:.0f}", True),
    ("deviation_l2", "How far the weights moved (L2)", "{:.2f}", False),
)
_MOST_ROWS = 500


def render_sweep_report(result: Mapping[str, Any]) -> str:
    """Render the page from `result.json`'s content; one self-contained HTML text, everything escaped."""
    groups, best = list(result["groups"]), result["recommended"]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("mtlsign.reports").joinpath("templates", "sweeps.html.j2").read_text("utf-8")
    drawn = _figures(groups, list(result["front"]), best)
    rows = list(result["rows"])
    return environment.from_string(source).render(
        subject=" · ".join(words(result[name]) for name in ("space", "run")),
        tone="good" if best is not None and best["drop_points"] <= result["max_drop"] else "bad",
        headline=_headline(result),
        why=words(result["why"], 300),
        facts=_facts(result),
        maps=[(name, title, Markup(drawn[name])) for name, title, *_ in _MAPS if name in drawn],
        front=Markup(drawn["front"]) if "front" in drawn else None,
        front_rows=[_group_cells(group, result["vary"]) for group in result["front"]],
        vary=[words(name, 40) for name in result["vary"]],
        cells=[_cells(row) for row in rows[:_MOST_ROWS]],
        left_out=max(0, len(rows) - _MOST_ROWS),
    )


def _headline(result: Mapping[str, Any]) -> str:
    best = result["recommended"]
    if best is None:
        return f"None of the {result['cells']} cells finished with a result."
    chosen = ", ".join(f"{_symbol(name)} = {_plain(best[name])}" for name in result["vary"])
    left = best["evidence_bits_attacked"]
    short = "" if left >= result["bits_required"] else f" ({result['bits_required']:g} are asked for)"
    return (
        f"Recommended: {chosen}. {left:,.0f} bits are left after the attacks{short}, "
        f"and the task {_change(best['drop_points'])} on validation data."
    )


def _change(points: float) -> str:
    if round(points, 2) == 0:
        return "keeps its accuracy"
    return f"{'loses' if points > 0 else 'gains'} {abs(points):.2f} points"


def _symbol(name: str) -> str:
    return {"lambda1": "λ₁", "lambda2": "λ₂"}.get(name, words(name, 40))


def _plain(value: object) -> str:
    found = number(value)
    return words(value, 60) if found is None else f"{found:g}"


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    states = ", ".join(
        f"{result[name]} {told}"
        for name, told in (("ok", "finished"), ("stopped", "stopped early"), ("diverged", "diverged"),
                           ("failed", "failed"))
        if result[name]
    )  # fmt: skip
    return [
        ("Space", words(result["space"], 200)),
        ("Cells", f"{result['cells']} ({states})"),
        ("Attacks on each", words(result["attacks"], 500)),
        ("Points a recommended cell may lose", f"{result['max_drop']:g}"),
        ("Bits from which a claim is accepted", f"{result['bits_required']:g}"),
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(name: str, pattern: str) -> str:
        value = number(row.get(name))
        return "–" if value is None else pattern.format(value)

    status = words(row["status"]) + (f": {words(row['reason'], 200)}" if row.get("reason") else "")
    return [
        shown("lambda1", "{:g}"), shown("lambda2", "{:g}"), shown("seed", "{:.0f}"),
        shown("primary_clean", "{:.2%}"), shown("primary_marked", "{:.2%}"), shown("drop_points", "{:+.2f}"),
        shown("wm_accuracy", "{:.2%}"), shown("evidence_bits", "{:,.0f}"),
        shown("evidence_bits_attacked", "{:,.0f}"), shown("deviation_l2", "{:.2f}"), status,
    ]  # fmt: skip


def _group_cells(group: Mapping[str, Any], vary: Sequence[str]) -> list[str]:
    def spread(name: str, pattern: str) -> str:
        mean, sd = number(group[name]), number(group.get(f"sd {name}"))
        told = "–" if mean is None else pattern.format(mean)
        return told if sd is None else f"{told} ± {pattern.format(sd)}"

    count = str(group["n"]) if group["n"] == group["cells"] else f"{group['n']} of {group['cells']}"
    return [
        *(_plain(group[name]) for name in vary), count, spread("drop_points", "{:.2f}"),
        spread("wm_accuracy", "{:.3f}"), spread("evidence_bits_attacked", "{:,.0f}"),
        spread("deviation_l2", "{:.2f}"),
    ]  # fmt: skip


def _figures(
    groups: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> dict[str, str]:
    """Heat maps where each λ1, λ2 has one combination; the front wherever anything finished."""
    drawn: dict[str, str] = {}
    places = {(group["lambda1"], group["lambda2"]): group for group in groups}
    with mpl.rc_context(figures._STYLE):
        if groups and len(places) == len(groups):
            for name, title, pattern, more in _MAPS:
                if all(number(group[name]) is not None for group in groups):
                    drawn[name] = figures._svg(
                        f"map-{name}", f"{title}, by λ1 and λ2.",
                        lambda ax, n=name, p=pattern, m=more: _heat(ax, places, best, n, p, m),  # type: ignore[misc]
                        size=(6.4, 5.2),
                    )  # fmt: skip
        if groups:
            told = "; ".join(
                f"{g['evidence_bits_attacked']:.0f} bits at {g['drop_points']:.2f} points" for g in front[:40]
            )
            drawn["front"] = figures._svg(
                "front", f"Bits left after the attacks against points lost; on the front: {told}.",
                lambda ax: _front(ax, groups, front, best), size=(7.6, 4.6),
            )  # fmt: skip
    return drawn


def _heat(
    ax: Axes,
    places: Mapping[tuple[float, float], Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    name: str,
    pattern: str,
    more: bool,
) -> None:
    xs, ys = sorted({b for _, b in places}), sorted({a for a, _ in places})
    missing = float("nan")
    grid = [[float(places[y, x][name]) if (y, x) in places else missing for x in xs] for y in ys]
    # Squares drawn one by one: an image would be a data: URI, which the page's own policy forbids.
    edges = [[i - 0.5 for i in range(len(axis) + 1)] for axis in (xs, ys)]
    ax.pcolormesh(*edges, grid, cmap="viridis" if more else "viridis_r")
    found = [value for line in grid for value in line if value == value]
    low, high = min(found), max(found)
    small = 10 if len(xs) <= 5 else 7
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if value == value:
                bright = (value - low) / (high - low or 1) > 0.5
                ink = "black" if bright == more else "white"
                ax.text(
                    column, row, pattern.format(value), ha="center", va="center", color=ink, fontsize=small
                )
    if best is not None and (best["lambda1"], best["lambda2"]) in places:
        column, row = xs.index(best["lambda2"]), ys.index(best["lambda1"])
        ax.add_patch(
            mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=3)
        )
    ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    ax.set_xlabel("λ₂ (survive changes)")
    ax.set_ylabel("λ₁ (stay near W0)")
    ax.grid(False)


def _front(
    ax: Axes,
    groups: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
) -> None:
    def plot(some: Sequence[Mapping[str, Any]], **look: Any) -> None:
        ax.scatter([g["drop_points"] for g in some], [g["evidence_bits_attacked"] for g in some], **look)

    plot(groups, color=GREY, alpha=0.5, settings=22, label="a combination")
    plot(front, color=BLUE, settings=34, label="on the front")
    if best is not None:
        plot([best], facecolors="none", edgecolors=ORANGE, linewidths=2.2, settings=150, label="recommended")
    ax.set_xlabel("points of validation accuracy lost")
    ax.set_ylabel("fewest bits left after an attack")
    figures._legend_above(ax, columns=3)
