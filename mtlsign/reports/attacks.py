"""What an owner reads after an attack run: every attack in a table, and bits left against points lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes

from mtlsign.reports import figures
from mtlsign.reports.figures import BLUE, GREEN, ORANGE
from mtlsign.reports.formatting import number, words

#: What is drawn of a row: label, kind, points lost, bits, whether the mark was removed.
Point = tuple[str, str, float, float, bool]
#: The plot's x axis ends here; what lost more is drawn at the edge.
FURTHEST = 30.0
_LOOKS = {
    "none": ("unattacked", GREEN, "*"),
    "removal": ("at a price", BLUE, "o"),
    "free": ("for nothing", ORANGE, "^"),
}


def render_attack_report(result: Mapping[str, Any]) -> str:
    """Render the page from `result.json`'s content; one self-contained HTML text, everything escaped."""
    rows = list(result["rows"])
    bits, points = float(result["bits_required"]), float(result["max_points_lost"])
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("mtlsign.reports").joinpath("templates", "attacks.html.j2").read_text("utf-8")
    plot = bits_against_points(rows, bits, points)
    return environment.from_string(source).render(
        headline=_headline(result, bits),
        tone="bad" if result["removed"] else "good" if result["marked"] else "open",
        subject=" · ".join(words(result[name]) for name in ("task", "model", "run") if result.get(name)),
        facts=_facts(result),
        plot=Markup(plot) if plot else None,
        groups=[(title, found) for title, kinds in _GROUPS if (found := _table(rows, kinds))],
        points=points,
        bits=bits,
    )


_GROUPS = (
    ("The model as it was", ("none",)),
    ("Attacks that cost data, steps or accuracy", ("removal",)),
    ("Changes that cost nothing: the function stays exactly the same", ("free",)),
    ("Forging: somebody else's claim on this model", ("forgery",)),
)


def _headline(result: Mapping[str, Any], bits: float) -> str:
    count, removed = result["attacks"], result["removed"]
    rule = f"left fewer than {bits:g} bits and cost at most {result['max_points_lost']:g} points"
    if not result["marked"]:
        return f"The model did not carry {bits:g} bits before any attack, so there was nothing to remove."
    if not removed:
        return f"None of {count} attacks {rule}."
    return f"{removed} of {count} attacks {rule}: the field calls the mark removed there."


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    left = [f"{result[name]} {told}" for name, told in (
        ("diverged", "diverged"), ("not_applicable", "did not apply"), ("failed", "failed")) if result[name]
    ]  # fmt: skip
    rows = [
        ("Task", words(result["task"])),
        ("Model", words(result["model"], 300)),
        ("Attackers' data", "their tenth of the training part"
         + (f" and {result['budget']:.0%} of the owner's" if result["budget"] else "")),
        ("Seed of the attackers", words(result["seed"])),
        ("Training rate (lr=full)", f"{result['lr']:g}"),
        ("Without a result", ", ".join(left)),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _table(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[dict[str, str]]:
    return [_cells(row) for row in rows if row["kind"] in kinds]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    def share(name: str) -> str:
        value = number(row[name])
        return "–" if value is None else f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"

    bits, lost, seconds = (number(row[name]) for name in ("evidence_bits", "points_lost", "seconds"))
    outcome = {True: "removed", False: "kept"}.get(row["removed"], "")
    if row["status"] != "ok":
        outcome = words(row["status"]).replace("_", " ")
    elif row["kind"] == "none" or row["kind"] == "forgery":
        outcome = words(row["verdict"]).replace("_", " ")
    elif row["verdict"] == "not_verifiable":
        outcome = "not verifiable"
    elif outcome == "kept" and not row["accepted"] and row["verdict"] == "rejected":
        outcome = "rejected, model ruined"
    return {
        "attack": words(row["attack"]), "setting": words(row["setting"], 300), "wm": share("wm_accuracy"),
        "bits": "–" if bits is None else f"{bits:,.1f}", "after": share("primary_after"),
        "lost": "–" if lost is None else f"{lost:+.2f}",
        "cost": f"{row['steps']:,} steps, {row['images']:,} images" if row["steps"] else "–",
        "seconds": "–" if seconds is None else f"{seconds:,.1f}",
        "outcome": outcome, "reason": words(row["reason"] or "", 300),
        "tone": "bad" if row["removed"] is True else "",
    }  # fmt: skip


def _label(row: Mapping[str, Any]) -> str:
    """`spoil 60`: the attack and the first of its settings, which is the one that its variants differ in."""
    first = "" if "+" in row["attack"] else str(row["setting"]).partition(" ")[0].partition("=")[2]
    return words(f"{row['attack']} {first}".strip(), 40)


def bits_against_points(rows: Sequence[Mapping[str, Any]], bits: float, points: float) -> str | None:
    """An SVG of evidence bits against points lost with the field's rule drawn in; None without points."""
    found = [
        (_label(row), str(row["kind"]), x, y, row["removed"] is True)
        for row in rows
        if row["kind"] in _LOOKS
        and row["verdict"] != "not_verifiable"
        and (x := number(row["points_lost"])) is not None
        and (y := number(row["evidence_bits"])) is not None
    ]
    if not found:
        return None
    told = "; ".join(f"{name} {y:.0f} bits at {x:.1f} points" for name, _, x, y, _ in found[:60])
    rule = f"Removed means under {bits:g} bits and at most {points:g} points."
    text = f"Evidence bits left against points lost. {rule} {told}."
    with mpl.rc_context(figures._STYLE):
        return figures._svg("attacks", text, lambda ax: _scatter(ax, found, bits, points), size=(8.4, 5.0))


def _scatter(ax: Axes, found: Sequence[Point], bits: float, points: float) -> None:
    top = max(bits * 1.25, *(1.08 * y for *_, y, _ in found))
    left = max(-points, min(-1.0, *(x - 0.5 for _, _, x, _, _ in found)))
    right = min(FURTHEST, max(points + 3, *(x + 1 for _, _, x, _, _ in found)))
    ax.fill_between([left, points], 0, bits, color="#a3400a", alpha=0.10, linewidth=0)
    ax.axhline(bits, color="#a3400a", linewidth=1.1, linestyle="--")
    ax.plot([points, points], [0, bits], color="#a3400a", linewidth=1.1, linestyle="--")
    ax.annotate(
        f"removed: under {bits:g} bits, at most {points:g} points lost", (right, bits), (-4, 4), ha="right",
        textcoords="offset points", fontsize=9, color="#7a3008",
    )  # fmt: skip
    for kind, (label, colour, marker) in _LOOKS.items():
        chosen = [(min(max(x, left), right), y) for _, k, x, y, _ in found if k == kind]
        if chosen:
            size = 150 if kind == "none" else 42
            xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
            ax.scatter(xs, ys, settings=size, marker=marker, color=colour, alpha=0.8, label=label,
                       edgecolors="white", linewidths=0.6, zorder=3)  # fmt: skip
    _names(ax, found, top, (left, right))
    ax.set_xlim(left, right + 0.02 * (right - left))
    ax.set_ylim(0, top)
    ax.set_xlabel("points of task accuracy lost (held-out data)")
    ax.set_ylabel("evidence left, bits")
    ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.3)


def _names(ax: Axes, found: Sequence[Point], top: float, ends: tuple[float, float]) -> None:
    """Name the points that lost bits, lowest first, as long as names do not fall on each other."""
    best = max(y for *_, y, _ in found)
    left, right = ends
    placed: list[tuple[float, float]] = []
    for name, kind, x, y, removed in sorted(found, key=lambda p: (not p[4], p[3])):
        x = min(max(x, left), right)
        if kind == "none" or (y > 0.9 * best and not removed):
            continue
        near = any(abs(x - a) < 0.16 * (right - left) and abs(y - b) < 0.035 * top for a, b in placed)
        if near or len(placed) >= 24:
            continue
        placed.append((x, y))
        end = x > 0.85 * right
        ax.annotate(
            name, (x, y), (-6 if end else 6, -3), textcoords="offset points", fontsize=8.5,
            color="#374151", ha="right" if end else "left", parse_math=False,
        )  # fmt: skip
