"""Drawing of small SVG figures: style, colours and conversion to an inline element.

The other modules import Matplotlib's names from here, so that its log level is set before it loads its fonts.
"""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Callable
from typing import Any

# Matplotlib builds its font cache when it is first imported on a machine and logs that as a warning, which a
# job would print to its user's terminal.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

import matplotlib as mpl  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "RED", "Axes", "MaxNLocator", "PercentFormatter", "Rectangle",
    "add_legend_above", "render_svg",
]  # fmt: skip

BLUE, ORANGE, GREEN, GREY, RED = "#0b5cad", "#c2570c", "#1f7a5a", "#6b7280", "#a3400a"
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


def render_svg(
    name: str, description: str, painter: Callable[[Axes], None], size: tuple[float, float] = (4.8, 3.1)
) -> str:
    """Draw one figure.

    Args:
        name: seed of the ids inside the element. Equal data give equal bytes, and the ids of the figures on
            one page differ.
        description: text alternative for readers who cannot see the figure.
        painter: function that draws on the axes.
        size: width and height in inches.

    Returns:
        An ``<svg>`` element. Text in it stays text, and it refers to nothing outside itself.
    """
    with mpl.rc_context(_STYLE | {"svg.hashsalt": f"mtlsign/{name}"}):
        figure = Figure(figsize=size, layout="constrained")
        painter(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="[0-9. -]+"', svg)
    label = html.escape(description, quote=True)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def add_legend_above(ax: Axes, columns: int = 2) -> None:
    """Add a legend outside the axes, because data may fill every corner inside."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.3}
    ax.legend(ncols=columns, handlelength=1.6, columnspacing=1.2, **place)
