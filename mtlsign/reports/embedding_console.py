"""What a person reads while and after a network is marked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mtlsign.reports.console import LiveLine, table

_TITLES = {"clean": "phase 1, the task", "mark": "phase 2, the mark", "attacks": "attacks"}


class EmbedLine:
    """One live line per phase (in a sweep: of each cell): progress, loss terms, accuracies, time left."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = LiveLine(quiet=quiet)
        self._phase: str | None = None
        self._began, self._first, self._done = 0.0, 0.0, 0.0
        self._last: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """One whole line."""
        self._line.say(text)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of progress as `phases` tells it."""
        phase = str(row["phase"])
        if phase != self._phase or _part(row) < self._done:  # or the next cell's
            self.end()
            self._phase, self._began, self._first, self._last = phase, time.monotonic(), _part(row), {}
        self._last.update(row)
        self._done = _part(row)
        self._line.show(self._text())

    def end(self) -> None:
        """End the current line."""
        if self._phase is not None:
            self._line.show(self._text(), final=True)
            self._phase = None

    def _text(self) -> str:
        spent, done = time.monotonic() - self._began, self._done
        left = spent / (done - self._first) * (1 - done) if done > self._first else None
        row, parts = self._last, [f"{_TITLES[str(self._last['phase'])]} {done:4.0%}"]
        for name, label, pattern in (
            ("epoch", "epoch", "{}"), ("loss", "loss", "{:.3f}"),
            ("validation_accuracy", "validation", "{:.2%}"),
            ("wm_loss", "mark loss", "{:.3f}"), ("snapshot_loss", "perturbed", "{:.3f}"),
            ("distillation_loss", "distillation", "{:.4f}"), ("wm_accuracy", "bits", "{:.1%}"),
            ("snapshot_accuracy", "perturbed bits", "{:.1%}"), ("attack", "now", "{}"),
        ):  # fmt: skip
            if row.get(name) is not None:
                parts.append(f"{label} {pattern.format(row[name])}")
        if left is not None and done < 1:
            parts.append(f"{left:.0f} s left")
        elif done >= 1:
            parts.append(f"{spent:.0f} s")
        return " · ".join(parts)


def _part(row: Mapping[str, Any]) -> float:
    """How much of the phase a row says is done: a step's `of` counts steps, an epoch's counts epochs."""
    return float(row.get("step", row.get("epoch", 0))) / float(row["of"])


def summary(result: Mapping[str, Any], verdict: str) -> str:
    """Return the table at the end of a job: `verdict` (one sentence), rows, and the path of result.json."""
    drop = 100 * (result["primary_clean"] - result["primary_marked"])
    wrong = result["wm_accuracy_wrong_keys"]
    rows = [
        (
            "task, model",
            f"{result['task']}, {result['model']} (width {result['width']}), {result['head']} head",
        ),
        (
            "task accuracy (test)",
            f"{result['primary_clean']:.2%} clean, {result['primary_marked']:.2%} marked "
            f"(drop {drop:+.2f} points)",
        ),
        ("bits that agree", f"{result['matches']:,} of {result['n']:,} ({result['wm_accuracy']:.2%})"),
        (
            "evidence",
            f"{result['evidence_bits']:.1f} bits: by chance once in 2^{result['evidence_bits']:.1f} keys",
        ),
        ("the clean model", f"{result['wm_accuracy_on_clean']:.2%} of the bits"),
        ("wrong keys", f"{min(wrong):.1%} to {max(wrong):.1%}" if wrong else "none tried"),
        ("parameters moved", f"{result['deviation_l2']:.3f} (L2)"),
        (
            "time",
            f"{result['seconds_phase1']:.0f} s for the task, {result['seconds_phase2']:.0f} s for the mark",
        ),
        ("marked model (public)", str(result["model_path"])),
        ("owner kit (SECRET)", str(result["kit"])),
        ("report", str(result["report"])),
    ]
    return f"{verdict}\n{table(rows)}\nresult: {result['result']}"
