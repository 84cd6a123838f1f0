"""Report of a sweep: heat maps over λ1 × λ2, Pareto front, recommended combination, all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mtlsign.reports.formatting import number, words
from mtlsign.reports.pages import render_page
from mtlsign.reports.plotting import BLUE, GREY, ORANGE, Axes, Rectangle, add_legend_above, render_svg
from mtlsign.reports.provenance import provenance

Group = Mapping[str, Any]
Places = Mapping[tuple[float, float], Group]

#: Heat maps: field of a group, title, number format, and whether larger is better.
_MAPS = (
    ("drop_points", "Points of validation accuracy lost", "{:.2f}", False),
    ("wm_accuracy", "Share of watermark bits that match", "{:.3f}", True),
    ("evidence_bits_attacked", "Smallest evidence after any attack, in bits", "{:.0f}", True),
    ("deviation_l2", "L2 distance of the weights from W0", "{:.2f}", False),
)
_MAX_ROWS = 500


def render_sweep_report(result: Mapping[str, Any]) -> str:
    """Render the page from the content of ``result.json``: one self-contained HTML text, all escaped."""
    groups, best, rows = list(result["groups"]), result["recommended"], list(result["rows"])
    figures = _figures(groups, list(result["front"]), best)
    return render_page(
        "sweeps.html.j2",
        kind="MTLSign sweep report",
        subject=" · ".join(words(result[name]) for name in ("space", "run")),
        tone=_tone(result),
        headline=_headline(result),
        reason=words(result["why"], 300),
        facts=_facts(result),
        provenance=provenance(result),
        maps=[(name, title, Markup(figures[name])) for name, title, *_ in _MAPS if name in figures],
        front=Markup(figures["front"]) if "front" in figures else None,
        front_rows=[_group_cells(group, result["vary"]) for group in result["front"]],
        vary=[_symbol(name) for name in result["vary"]],
        cells=[_cells(row) for row in rows[:_MAX_ROWS]],
        left_out=max(0, len(rows) - _MAX_ROWS),
    )


def _tone(result: Mapping[str, Any]) -> str:
    """Return ``good`` for a cell within the limits, ``open`` if an attack removes its watermark."""
    best = result["recommended"]
    if best is None or best["drop_points"] > result["max_drop"]:
        return "bad"
    if (best["evidence_bits"] or 0.0) < result["bits_required"]:  # with --force
        return "bad"
    return "good" if best["evidence_bits_attacked"] >= result["bits_required"] else "open"


def _headline(result: Mapping[str, Any]) -> str:
    best = result["recommended"]
    if best is None:
        return f"No combination of the {result['cells']} cells is recommended."
    chosen = ", ".join(f"{_symbol(name)} = {_plain(best[name])}" for name in result["vary"])
    evidence = best["evidence_bits_attacked"]
    short = "" if evidence >= result["bits_required"] else f" ({result['bits_required']:g} bits are required)"
    return (
        f"Recommended: {chosen}. After the attacks, {evidence:,.0f} bits of evidence are left{short}. "
        f"The task {_change(best['drop_points'])} on validation data."
    )


def _change(points: float) -> str:
    if round(points, 2) == 0:
        return "keeps its accuracy"
    return f"{'loses' if points > 0 else 'gains'} {abs(points):.2f} points"


def _symbol(name: str) -> str:
    return {"lambda1": "λ₁", "lambda2": "λ₂"}.get(name, words(name, 40))


def _plain(value: object) -> str:
    as_number = number(value)
    return words(value, 60) if as_number is None else f"{as_number:g}"


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    states = ", ".join(
        f"{result[name]} {text}"
        for name, text in (("ok", "finished"), ("stopped", "stopped early"), ("diverged", "diverged"),
                           ("failed", "failed"))
        if result[name]
    )  # fmt: skip
    return [
        ("Space", words(result["space"], 200)),
        ("Cells", f"{result['cells']} ({states})"),
        ("Attacks on each cell", words(result["attacks"], 500)),
        ("Points that a recommended cell may lose", f"{result['max_drop']:g}"),
        ("Evidence from which a claim is accepted", f"{result['bits_required']:g} bits"),
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


def _group_cells(group: Group, vary: Sequence[str]) -> list[str]:
    def spread(name: str, pattern: str) -> str:
        mean, sd = number(group[name]), number(group.get(f"sd {name}"))
        text = "–" if mean is None else pattern.format(mean)
        return text if sd is None else f"{text} ± {pattern.format(sd)}"

    count = str(group["n"]) if group["n"] == group["cells"] else f"{group['n']} of {group['cells']}"
    return [
        *(_plain(group[name]) for name in vary), count, spread("drop_points", "{:.2f}"),
        spread("wm_accuracy", "{:.3f}"), spread("evidence_bits_attacked", "{:,.0f}"),
        spread("deviation_l2", "{:.2f}"),
    ]  # fmt: skip


def _figures(groups: Sequence[Group], front: Sequence[Group], best: Group | None) -> dict[str, str]:
    """Draw heat maps if each pair λ1, λ2 has one combination, and the front if any cell finished."""
    if not groups:
        return {}
    figures: dict[str, str] = {}
    places = {(group["lambda1"], group["lambda2"]): group for group in groups}
    for name, title, pattern, larger_is_better in _MAPS:
        if len(places) == len(groups) and all(number(group[name]) is not None for group in groups):
            figures[name] = render_svg(
                f"map-{name}", f"{title}, by λ1 and λ2.",
                lambda ax, n=name, p=pattern, m=larger_is_better: _draw_map(ax, places, best, n, p, m),  # type: ignore[misc]
                size=(5.4, 4.6),
            )  # fmt: skip
    listed = "; ".join(
        f"{group['evidence_bits_attacked']:.0f} bits at {group['drop_points']:.2f} points"
        for group in front[:40]
    )
    figures["front"] = render_svg(
        "front", f"Evidence left after the attacks against points lost; on the front: {listed}.",
        lambda ax: _draw_front(ax, groups, front, best), size=(5.4, 4.4),
    )  # fmt: skip
    return figures


def _draw_map(
    ax: Axes, places: Places, best: Group | None, name: str, pattern: str, larger_is_better: bool
) -> None:
    xs, ys = sorted({b for _, b in places}), sorted({a for a, _ in places})
    missing = float("nan")
    grid = [[float(places[y, x][name]) if (y, x) in places else missing for x in xs] for y in ys]
    # Drawn as squares: an image would be a data: URI, which the page's Content-Security-Policy forbids.
    edges = [[i - 0.5 for i in range(len(axis) + 1)] for axis in (xs, ys)]
    ax.pcolormesh(*edges, grid, cmap="viridis" if larger_is_better else "viridis_r")
    values = [value for line in grid for value in line if value == value]
    low, high = min(values), max(values)
    font_size = 10 if len(xs) <= 5 else 8
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if value == value:
                bright = ((value - low) / (high - low or 1) > 0.5) == larger_is_better
                ax.text(
                    column, row, pattern.format(value), ha="center", va="center",
                    color="black" if bright else "white", fontsize=font_size,
                )  # fmt: skip
    if best is not None and (best["lambda1"], best["lambda2"]) in places:
        column, row = xs.index(best["lambda2"]), ys.index(best["lambda1"])
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=3)
        ax.add_patch(frame)
    ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    ax.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    ax.set_xlabel("λ₂ (weight of R_DA)")
    ax.set_ylabel("λ₁ (weight of R_func)")
    ax.grid(False)


def _draw_front(ax: Axes, groups: Sequence[Group], front: Sequence[Group], best: Group | None) -> None:
    def plot(chosen: Sequence[Group], **style: Any) -> None:
        xs, ys = [g["drop_points"] for g in chosen], [g["evidence_bits_attacked"] for g in chosen]
        ax.scatter(xs, ys, **style)

    plot(groups, color=GREY, alpha=0.5, s=22, label="other combination")
    plot(front, color=BLUE, s=34, label="on the front")
    if best is not None:
        plot([best], facecolors="none", edgecolors=ORANGE, linewidths=2.2, s=150, label="recommended")
    ax.set_xlabel("points of validation accuracy lost")
    ax.set_ylabel("smallest evidence after any attack, bits")
    add_legend_above(ax, columns=3)
