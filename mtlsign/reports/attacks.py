"""Report of an attack run: evidence left against accuracy lost, and a table of all attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mtlsign.reports.formatting import number, words
from mtlsign.reports.pages import render_page
from mtlsign.reports.plotting import BLUE, GREEN, ORANGE, RED, Axes, render_svg
from mtlsign.reports.provenance import provenance

Row = Mapping[str, Any]

#: Right end of the figure's horizontal axis, in points; points beyond are drawn at its end.
MAX_POINTS_SHOWN = 30.0
_STYLES = {
    "none": ("not attacked", GREEN, "*"),
    "removal": ("removal attack", BLUE, "o"),
    "function_preserving": ("function-preserving change", ORANGE, "^"),
}
#: Title of a table, explanation below it, and the kinds of attacks in it.
_GROUPS = (
    ("Marked model before any attack", "", ("none",)),
    ("Removal attacks", "These attacks cost the attacker data, training steps or accuracy.", ("removal",)),
    (
        "Function-preserving changes",
        "These attacks change the weights but not the function of the model, so they cost no accuracy.",
        ("function_preserving",),
    ),
    (
        "Ambiguity attacks",
        "These attacks do not remove the watermark. They make a second claim on the same model.",
        ("ambiguity",),
    ),
)


@dataclass(frozen=True)
class _Point:
    """One attack in the figure."""

    label: str
    kind: str
    points_lost: float
    bits: float
    removed: bool


def render_attack_report(result: Mapping[str, Any]) -> str:
    """Render the page from the content of ``result.json``: one self-contained HTML text, all escaped."""
    rows = list(result["rows"])
    bits, points = float(result["bits_required"]), float(result["max_points_lost"])
    plot = evidence_by_points_lost(rows, bits, points)
    tables = [(title, text, [_cells(row) for row in rows if row["kind"] in kinds])
              for title, text, kinds in _GROUPS]  # fmt: skip
    return render_page(
        "attacks.html.j2",
        kind="MTLSign attack report",
        subject=" · ".join(words(result[name]) for name in ("task", "model", "run") if result.get(name)),
        headline=_headline(result, bits),
        rule=f"An attack removes the watermark if it leaves fewer than {bits:g} bits of evidence and costs "
        f"at most {points:g} points of task accuracy.",
        tone="bad" if result["removed"] else "good" if result["marked"] else "open",
        facts=_facts(result),
        provenance=provenance(result),
        plot=Markup(plot) if plot else None,
        groups=[group for group in tables if group[2]],
        points=points,
        bits=bits,
    )


def _headline(result: Mapping[str, Any], bits: float) -> str:
    count, removed = result["attacks"], result["removed"]
    if not result["marked"]:
        return (
            f"The model had fewer than {bits:g} bits of evidence before any attack. Nothing could be removed."
        )
    if not removed:
        return f"None of {count} attacks removed the watermark."
    costless = costless_removals(result["rows"])
    if not costless:
        return f"{removed} of {count} attacks removed the watermark. Each of them costs accuracy."
    names = words(", ".join(costless), 200)
    return (
        f"{removed} of {count} attacks removed the watermark, and {len(costless)} of them cost no accuracy: "
        f"{names}."
    )


def costless_removals(rows: Sequence[Row]) -> list[str]:
    """Return the attacks that remove the watermark and keep the model's accuracy."""
    return [
        f"{row['attack']} {row['parameters']}".strip()
        for row in rows
        if row["removed"] is True and (lost := number(row["points_lost"])) is not None and round(lost, 2) <= 0
    ]


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    missing = ", ".join(
        f"{result[name]} {text}"
        for name, text in (
            ("diverged", "diverged"), ("not_applicable", "not applicable"), ("failed", "failed"),
        )
        if result[name]
    )  # fmt: skip
    data = "a tenth of the training part, which the owner did not use"
    if result["budget"]:
        data += f", and {result['budget']:.0%} of the owner's training data"
    rows = [
        ("Task", words(result["task"])),
        ("Model", words(result["model"], 300)),
        ("Data of the attacker", data),
        ("Seed of the attacks", words(result["seed"])),
        ("Learning rate of phase 1 (lr=full)", f"{result['lr']:g}"),
        ("Attacks without a result", missing),
    ]
    return [(name, value) for name, value in rows if value]


def _cells(row: Row) -> dict[str, str]:
    def share(name: str) -> str:
        value = number(row[name])
        return "–" if value is None else f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"

    bits, lost, seconds = (number(row[name]) for name in ("evidence_bits", "points_lost", "seconds"))
    return {
        "attack": words(row["attack"]), "parameters": words(row["parameters"], 300),
        "matching": share("wm_accuracy"), "bits": "–" if bits is None else f"{bits:,.1f}",
        "after": share("primary_after"), "lost": "–" if lost is None else f"{lost:+.2f}",
        "cost": f"{row['steps']:,} steps, {row['images']:,} images" if row["steps"] else "–",
        "seconds": "–" if seconds is None else f"{seconds:,.1f}",
        "outcome": _outcome(row) + (", at no cost" if costless_removals([row]) else ""),
        "reason": words(row["reason"] or "", 300),
        "tone": "bad" if row["removed"] is True else "",
    }  # fmt: skip


def _outcome(row: Row) -> str:
    if row["status"] != "ok":
        return words(row["status"]).replace("_", " ")
    if row["kind"] in ("none", "ambiguity"):
        return words(row["verdict"]).replace("_", " ")
    if row["verdict"] == "not_verifiable":
        return "not verifiable"
    if row["removed"] is False and not row["accepted"] and row["verdict"] in ("rejected", "unrelated"):
        return "watermark rejected, but too much accuracy lost"
    return {True: "watermark removed", False: "watermark kept"}.get(row["removed"], "–")


def evidence_by_points_lost(rows: Sequence[Row], bits: float, points: float) -> str | None:
    """Draw evidence left against points lost, with the region of removed watermarks.

    Args:
        rows: rows of the attack table.
        bits: evidence in bits below which the watermark counts as removed.
        points: accuracy in percentage points that a removal may cost at most.

    Returns:
        An ``<svg>`` element, or None if no row has both values.
    """
    shown = [
        _Point(_label(row), str(row["kind"]), lost, evidence, row["removed"] is True)
        for row in rows
        if row["kind"] in _STYLES
        and row["verdict"] != "not_verifiable"
        and (lost := number(row["points_lost"])) is not None
        and (evidence := number(row["evidence_bits"])) is not None
    ]
    if not shown:
        return None
    listed = "; ".join(f"{p.label} {p.bits:.0f} bits at {p.points_lost:.1f} points" for p in shown[:60])
    rule = f"Removed means fewer than {bits:g} bits and at most {points:g} points."
    description = f"Evidence left, in bits, against points lost. {rule} {listed}."
    return render_svg("attacks", description, lambda ax: _scatter(ax, shown, bits, points), size=(5.4, 4.8))


def _label(row: Row) -> str:
    """Return attack and first parameter, such as `spoil 60`; variants of an attack differ in it."""
    first = "" if "+" in row["attack"] else str(row["parameters"]).partition(" ")[0].partition("=")[2]
    return words(f"{row['attack']} {first}".strip(), 40)


def _scatter(ax: Axes, shown: Sequence[_Point], bits: float, points: float) -> None:
    top = max(bits * 1.25, *(1.08 * p.bits for p in shown))
    left = max(-points, min(-1.0, *(p.points_lost - 0.5 for p in shown)))
    right = min(MAX_POINTS_SHOWN, max(points + 3, *(p.points_lost + 1 for p in shown)))
    ax.fill_between([left, points], 0, bits, color=RED, alpha=0.10, linewidth=0)
    ax.axhline(bits, color=RED, linewidth=1.1, linestyle="--")
    ax.plot([points, points], [0, bits], color=RED, linewidth=1.1, linestyle="--")
    ax.annotate(
        f"removed: under {bits:g} bits, at most {points:g} points lost", (right, bits), (-4, 4), ha="right",
        textcoords="offset points", fontsize=10, color="#7a3008",
    )  # fmt: skip
    for kind, (label, colour, marker) in _STYLES.items():
        chosen = [(min(max(p.points_lost, left), right), p.bits) for p in shown if p.kind == kind]
        if chosen:
            size = 150 if kind == "none" else 42
            xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
            ax.scatter(xs, ys, s=size, marker=marker, color=colour, alpha=0.8, label=label,
                       edgecolors="white", linewidths=0.6, zorder=3)  # fmt: skip
    _add_names(ax, shown, top, (left, right))
    ax.set_xlim(left, right + 0.02 * (right - left))
    ax.set_ylim(0, top)
    ax.set_xlabel("points of task accuracy lost (held-out data)")
    ax.set_ylabel("evidence left, in bits")
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.3)


def _add_names(ax: Axes, shown: Sequence[_Point], top: float, ends: tuple[float, float]) -> None:
    """Name the points that lost bits, lowest first, as long as the names do not overlap."""
    best = max(p.bits for p in shown)
    left, right = ends
    placed: list[tuple[float, float]] = []
    for point in sorted(shown, key=lambda p: (not p.removed, p.bits)):
        x, y = min(max(point.points_lost, left), right), point.bits
        if point.kind == "none" or (y > 0.9 * best and not point.removed):
            continue
        near = any(abs(x - a) < 0.3 * (right - left) and abs(y - b) < 0.05 * top for a, b in placed)
        if near or len(placed) >= 24:
            continue
        placed.append((x, y))
        at_end = x > 0.85 * right
        ax.annotate(
            point.label, (x, y), (-6 if at_end else 6, -3), textcoords="offset points", fontsize=9.5,
            color="#374151", ha="right" if at_end else "left", parse_math=False,
        )  # fmt: skip
