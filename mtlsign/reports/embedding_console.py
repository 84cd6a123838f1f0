"""Terminal output of an embedding job: progress line and table of results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mtlsign.reports.console import LiveLine, table
from mtlsign.reports.formatting import further_scores

_TITLES = {"clean": "phase 1, task training", "mark": "phase 2, watermark", "attacks": "attacks"}
#: Column of a progress row, its label, and its number format.
_COLUMNS = (
    ("epoch", "epoch", "{}"), ("loss", "loss", "{:.3f}"), ("validation_accuracy", "validation", "{:.2%}"),
    ("wm_loss", "watermark loss", "{:.3f}"), ("snapshot_loss", "perturbed", "{:.3f}"),
    ("distillation_loss", "distillation", "{:.4f}"), ("wm_accuracy", "bits", "{:.1%}"),
    ("snapshot_accuracy", "perturbed bits", "{:.1%}"), ("attack", "now", "{}"),
)  # fmt: skip
#: Columns that a line of more than 80 columns does without, the least important first.
_EXPENDABLE = ("epoch", "snapshot_loss", "distillation_loss", "loss", "wm_loss", "attack")
_WIDTH, _SEPARATOR = 80, " · "


class EmbedLine:
    """Progress of embedding: one live line per phase (in a sweep, per phase of each cell)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine(quiet=quiet)
        self._phase: str | None = None
        self._start, self._first, self._completed = 0.0, 0.0, 0.0
        self._last: dict[str, Any] = {}

    def log(self, text: str) -> None:
        """Print a separate line."""
        self._line.log(text)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of progress; a new phase or cell starts a new line. A warning is a separate line."""
        if "warning" in row:
            self.log(f"warning: {row['warning']}")
            return
        phase = str(row["phase"])
        if phase != self._phase or _fraction(row) < self._completed:
            self.end()
            self._phase, self._start, self._first, self._last = phase, time.monotonic(), _fraction(row), {}
        self._last.update(row)
        self._completed = _fraction(row)
        self._line.show(self._text())

    def end(self) -> None:
        """End the current line."""
        if self._phase is not None:
            self._line.show(self._text(), final=True)
            self._phase = None

    def _text(self) -> str:
        """Return the line, without its least important parts if it would exceed 80 columns."""
        row, completed = self._last, self._completed
        seconds = time.monotonic() - self._start
        parts = {"": f"{_TITLES[str(row['phase'])]} {completed:4.0%}"}
        for name, label, pattern in _COLUMNS:
            if row.get(name) is not None:
                parts[name] = f"{label} {pattern.format(row[name])}"
        if completed >= 1:
            parts["time"] = f"{seconds:.0f} s"
        elif completed > self._first:
            parts["time"] = f"{seconds / (completed - self._first) * (1 - completed):.0f} s left"
        for name in _EXPENDABLE:
            if len(_SEPARATOR.join(parts.values())) >= _WIDTH:
                parts.pop(name, None)
        return _SEPARATOR.join(parts.values())


def _fraction(row: Mapping[str, Any]) -> float:
    """Return the completed fraction of the phase: `of` counts steps in rows with a step, else epochs."""
    return float(row.get("step", row.get("epoch", 0))) / float(row["of"])


def summary(result: Mapping[str, Any], verdict: str) -> str:
    """Return the table that ends the job: `verdict` (one sentence), rows, and the path of result.json."""
    drop = 100 * (result["primary_clean"] - result["primary_marked"])
    wrong, bits = result["wm_accuracy_wrong_keys"], result["evidence_bits"]
    clean, marked = result["primary_clean"], result["primary_marked"]
    rows = [
        ("task", result["task"]),
        ("model", f"{result['model']} (width {result['width']}), {result['head']} head"),
        ("task accuracy (test)", f"{clean:.2%} clean, {marked:.2%} marked (drop {drop:+.2f} points)"),
        *further_scores(result),
        ("matching bits", f"{result['matches']:,} of {result['n']:,} ({result['wm_accuracy']:.2%})"),
        ("evidence", f"{bits:.1f} bits (probability by chance 2^-{bits:.1f})"),
        ("matching bits, clean model", f"{result['wm_accuracy_on_clean']:.2%}"),
        ("matching bits, wrong keys", f"{min(wrong):.1%} to {max(wrong):.1%}" if wrong else "not measured"),
        ("parameter deviation (L2)", f"{result['deviation_l2']:.3f}"),
        ("duration", f"{result['seconds_phase1']:.0f} s phase 1, {result['seconds_phase2']:.0f} s phase 2"),
        (
            "marked model (DO NOT PUBLISH)" if result["problem"] else "marked model (public)",
            str(result["model_path"]),
        ),
        *(("owner kit (SECRET)", str(kit)) for kit in (result["kit"], *result.get("further_kits", []))),
        *(("warning", warning) for warning in result["warnings"]),
        ("report", str(result["report"])),
    ]
    return f"{verdict}\n{table(rows)}\nresult: {result['result']}"
