"""Report of a comparison of schemes: heat map, evidence against points lost, cost of embedding, all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mtlsign.reports.formatting import number, words
from mtlsign.reports.pages import render_page
from mtlsign.reports.plotting import BLUE, GREY, ORANGE, Axes, render_svg
from mtlsign.reports.provenance import provenance

Row = Mapping[str, Any]

#: Right end of the axis of points lost; attacks that cost more are drawn at its end.
MAX_POINTS_SHOWN = 30.0
#: Text colour changes to black above this share of the evidence left.
_BRIGHT = 0.5


@dataclass(frozen=True)
class SchemeRows:
    """Rows of one scheme.

    Attributes:
        name: name of the scheme.
        embedding: row of the marked network before any attack.
        attacks: rows of the attacks, in the order of the study.
    """

    name: str
    embedding: Row
    attacks: Sequence[Row]

    @property
    def bits(self) -> float | None:
        """Mean evidence before any attack; None if the scheme did not mark the network."""
        return number(self.embedding["bits"])

    def share_left(self, row: Row) -> float | None:
        """Return the evidence that an attack leaves as a share of the evidence before it, 0 to 1."""
        left = number(row["bits"])
        if left is None or not self.bits:
            return None
        return max(0.0, min(1.0, left / self.bits))


def rows_by_scheme(rows: Sequence[Row]) -> list[SchemeRows]:
    """Divide the rows of the table among the schemes, in order; the first row of each is the embedding."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["scheme"]), []).append(row)
    return [SchemeRows(name, group[0], group[1:]) for name, group in groups.items()]


def short_labels(attacks: Sequence[str]) -> dict[str, str]:
    """Return attack with parameters -> label, without the parameters that all its variants share."""
    variants: dict[str, list[list[str]]] = {}
    for attack in attacks:
        name, *parameters = attack.split()
        variants.setdefault(name, []).append(parameters)
    labels = {}
    for attack in attacks:
        name, *parameters = attack.split()
        own = [text for text in parameters if not all(text in others for others in variants[name])]
        labels[attack] = " ".join([name, *own])
    return labels


def cheapest_removals(scheme: SchemeRows) -> list[tuple[float, float, str]]:
    """Return the Pareto front of the attacks on a scheme.

    Args:
        scheme: the rows of the scheme.

    Returns:
        (points lost, bits left, attack), by points lost: no other attack costs at most as many points and
        leaves fewer bits.
    """
    points = [
        (lost, bits, str(row["attack"]))
        for row in scheme.attacks
        if (lost := number(row["points lost"])) is not None and (bits := number(row["bits"])) is not None
    ]
    front: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def render_comparison_report(result: Mapping[str, Any]) -> str:
    """Render the page from the content of ``result.json``: one self-contained HTML text, all escaped."""
    schemes = rows_by_scheme(result["rows"])
    marked = [scheme for scheme in schemes if scheme.bits is not None]
    counts = sorted({int(scheme.embedding["n"]) for scheme in marked}) or [0]
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    attacks = list(dict.fromkeys(str(row["attack"]) for scheme in marked for row in scheme.attacks))
    labels = short_labels(attacks)
    return render_page(
        "comparison.html.j2",
        kind="MTLSign comparison of schemes",
        subject=" · ".join(words(result[name]) for name in ("task", "run") if result.get(name)),
        headline=f"{len(marked)} of {len(schemes)} schemes marked the network. {len(attacks)} attacks ran on "
        f"each, with {seeds} {'seed' if seeds == '1' else 'seeds'}.",
        facts=[
            ("Task", words(result["task"])),
            ("Seeds, each with its own network, key and attackers", seeds),
            ("Attacks", words(", ".join(attacks), 3000)),
        ],
        provenance=provenance(result),
        heat_map=Markup(_heat_map(marked, labels)) if attacks else None,
        panels=[
            (words(scheme.name), Markup(_panel(scheme, labels)), _front_text(scheme, labels))
            for scheme in marked
            if cheapest_removals(scheme)
        ],
        embeddings=[_embedding_cells(scheme) for scheme in schemes],
        tables=[
            (words(scheme.name), [_cells(row) for row in scheme.attacks])
            for scheme in marked
            if scheme.attacks
        ],
    )


def _front_text(scheme: SchemeRows, labels: Mapping[str, str]) -> str:
    """Return the attacks on the front in one text, the cheapest first."""
    return "; ".join(
        f"{words(labels[attack])}: {bits:,.0f} bits at {lost:.1f} points"
        for lost, bits, attack in cheapest_removals(scheme)
    )


def _heat_map(schemes: Sequence[SchemeRows], labels: Mapping[str, str]) -> str:
    size = (3.0 + 0.62 * len(schemes), 2.2 + 0.34 * len(labels))
    description = (
        f"Evidence left in bits, by scheme and attack, for {len(schemes)} schemes and {len(labels)} attacks."
    )
    return render_svg("heat-map", description, lambda ax: _draw_heat_map(ax, schemes, labels), size=size)


def _draw_heat_map(ax: Axes, schemes: Sequence[SchemeRows], labels: Mapping[str, str]) -> None:
    """Draw one square for each attack (row) and scheme (column), with the mean bits as text."""
    cells = [{str(row["attack"]): row for row in scheme.attacks} for scheme in schemes]
    grid: list[list[float]] = []
    for y, attack in enumerate(labels):
        line: list[float] = []
        for x, scheme in enumerate(schemes):
            row = cells[x].get(attack)
            share = None if row is None else scheme.share_left(row)
            line.append(float("nan") if share is None else share)
            text = "–" if row is None or share is None else _bits_text(row)
            colour = GREY if share is None else "black" if share > _BRIGHT else "white"
            ax.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
        grid.append(line)
    # Drawn as squares: an image would be a data: URI, which the page's Content-Security-Policy forbids.
    edges = [[i - 0.5 for i in range(count + 1)] for count in (len(schemes), len(labels))]
    ax.pcolormesh(*edges, grid, cmap="viridis", vmin=0, vmax=1)
    ax.set_xticks(range(len(schemes)))
    ax.set_xticklabels([s.name for s in schemes], rotation=45, ha="left", parse_math=False, fontsize=9)
    ax.set_yticks(range(len(labels)))
    ax.set_yticklabels([words(label, 60) for label in labels.values()], parse_math=False, fontsize=9)
    ax.xaxis.tick_top()
    ax.invert_yaxis()
    ax.grid(False)


def _bits_text(row: Row) -> str:
    """Return the mean bits, in brackets if the claim was rejected with every seed."""
    text = f"{float(row['bits']):,.0f}"
    return text if row["accepted"] else f"({text})"


def _panel(scheme: SchemeRows, labels: Mapping[str, str]) -> str:
    return render_svg(
        f"front-{scheme.name}",
        f"{scheme.name}: evidence left against points lost. On the front: {_front_text(scheme, labels)}.",
        lambda ax: _draw_panel(ax, scheme),
        size=(4.2, 2.7),
    )


def _draw_panel(ax: Axes, scheme: SchemeRows) -> None:
    """Draw all attacks on one scheme, the front as a line, and the spread over seeds as bars."""
    places = []
    for row in scheme.attacks:
        lost, bits = number(row["points lost"]), number(row["bits"])
        if lost is None or bits is None:
            continue
        x = min(lost, MAX_POINTS_SHOWN)
        places.append((x, bits))
        for spread, along_x in ((number(row["sd points lost"]), True), (number(row["sd bits"]), False)):
            if spread:
                xs = (max(x - spread, -2), min(x + spread, MAX_POINTS_SHOWN)) if along_x else (x, x)
                ys = (bits, bits) if along_x else (max(bits - spread, 0), bits + spread)
                ax.plot(xs, ys, color=GREY, linewidth=0.8, alpha=0.5)
    ax.scatter([x for x, _ in places], [y for _, y in places], color=BLUE, s=20)
    front = cheapest_removals(scheme)
    ax.plot(
        [min(lost, MAX_POINTS_SHOWN) for lost, _, _ in front],
        [bits for _, bits, _ in front],
        color=ORANGE, drawstyle="steps-post", linewidth=1.6,
    )  # fmt: skip
    ax.set_xlim(-3, MAX_POINTS_SHOWN + 1)
    ax.set_ylim(bottom=-0.05 * ax.get_ylim()[1])  # otherwise the axis hides attacks that leave nothing
    ax.set_xlabel("points lost")
    ax.set_ylabel("bits left")


def _spread(row: Row, name: str, pattern: str) -> str:
    mean, sd = number(row[name]), number(row.get(f"sd {name}"))
    text = "–" if mean is None else pattern.format(mean)
    return text if sd is None else f"{text} ± {pattern.format(sd)}"


def _embedding_cells(scheme: SchemeRows) -> dict[str, str]:
    row, null_rate = scheme.embedding, number(scheme.embedding["null rate"])
    epochs = number(row.get("epochs"))
    return {
        "scheme": words(scheme.name),
        "n": str(row["n"]),
        "matches": "–" if row["of"] is None else f"{_spread(row, 'matches', '{:.1f}')} of {row['of']}",
        "null_rate": "–" if null_rate is None else f"{null_rate:.2g}",
        "bits": _spread(row, "bits", "{:,.0f}"),
        "lost": _spread(row, "points lost", "{:.2f}"),
        "epochs": "–" if epochs is None else f"{epochs:.1f}",
        "accepted": f"{row['accepted']} of {row['n']}",
        "reason": words(row["reason"] or "", 300),
    }


def _cells(row: Row) -> dict[str, str]:
    return {
        "attack": words(row["attack"], 200),
        "n": str(row["n"]),
        "matches": "–" if row["of"] is None else f"{_spread(row, 'matches', '{:.1f}')} of {row['of']}",
        "bits": _spread(row, "bits", "{:,.0f}"),
        "lost": _spread(row, "points lost", "{:.1f}"),
        "accepted": f"{row['accepted']} of {row['n']}",
        "reason": words(row["reason"] or "", 300),
    }
