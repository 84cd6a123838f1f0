"""Terminal output of an attack job: progress line, list of attacks, table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mtlsign.reports import console

Row = Mapping[str, Any]


class Plan(Protocol):
    """One row of the attack table, as far as the progress line needs it."""

    @property
    def name(self) -> str:
        """Return the names of its attacks."""

    @property
    def parameters(self) -> str:
        """Return their parameters."""


class AttackLine:
    """Progress of an attack run: one line per attack, rewritten while it trains."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = console.LiveLine(quiet=quiet)

    def log(self, text: str) -> None:
        """Print a separate line."""
        self._line.log(text)

    def tick(self, plan: Plan, step: int, steps: int) -> None:
        """Show that the attack of `plan` has completed `step` of `steps`."""
        self._line.show(f"{plan.name} {plan.parameters} · step {step:,} of {steps:,}")

    def waiting(self, running: Sequence[Plan], remaining: int) -> None:
        """Show which attacks run on other machines and how many remain."""
        names = ", ".join(plan.name for plan in running)
        self._line.show(f"running {names}" + (f" · {remaining} remaining" if remaining else ""))

    def row(self, row: Row, number: int, count: int) -> None:
        """Show a finished row."""
        self._line.show(f"{number:3}/{count} {format_result(row)}", final=True)


def print_catalogue(attacks: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print each attack with its parameters and defaults (`mtlsign.attacks.describe`)."""
    if as_json:
        console.print_json(attacks)
        return
    for title, kind in (
        ("removal attacks", "removal"), ("function-preserving changes", "function_preserving"),
        ("ambiguity attacks", "ambiguity"),
    ):  # fmt: skip
        print(f"{title}:")
        rows = []
        for attack in (a for a in attacks if a["kind"] == kind):
            parameters = " ".join(f"{k}={v}" for k, v in attack["settings"].items())
            rows.append((attack["attack"], attack["summary"] + (f" [{parameters}]" if parameters else "")))
        print(console.table(rows))
    print("sets: fast, standard, all; parameters: NAME:KEY=VALUE,KEY=VALUE/OTHER; in sequence: NAME+NAME")


def summary(result: Mapping[str, Any]) -> str:
    """Return the table that ends the job; its last lines name the written files."""
    rule = f"under {result['bits_required']:g} bits, at most {result['max_points_lost']:g} points lost"
    rows = [(f"{row['attack']} {row['parameters']}".strip(), _outcome(row)) for row in result["rows"]]
    missing = ", ".join(
        f"{result[n]} {n.replace('_', ' ')}" for n in ("diverged", "not_applicable", "failed") if result[n]
    )
    head = f"{result['removed']} of {result['attacks']} attacks removed the watermark ({rule})"
    if not result["marked"]:
        head = f"the model had fewer than {result['bits_required']:g} bits of evidence before any attack"
    tail = f"report: {result['report']}\ntable: {result['csv']}\nresult: {result['result']}"
    return f"{head}{'; ' + missing if missing else ''}\n{console.table(rows)}\n{tail}"


def _outcome(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status'].replace('_', ' ')}: {row['reason']}"
    if row["verdict"] == "not_verifiable":
        return f"not verifiable: {row['reason']}"
    lost = "" if row["points_lost"] is None else f"{row['points_lost']:+7.2f} points lost"
    return (
        f"{row['wm_accuracy']:7.2%} {row['evidence_bits']:8.1f} bits {lost}"
        f"{'  REMOVED' if row['removed'] else ''}"
    )


def format_result(row: Row) -> str:
    """Format one finished row for the terminal."""
    name = f"{row['attack']} {row['parameters']}".strip()
    if row["status"] != "ok":
        return f"{name} · {row['status'].replace('_', ' ')}: {row['reason']} · {row['seconds']:.1f} s"
    if row["verdict"] == "not_verifiable":
        evidence = f"not verifiable: {row['reason']}"
    else:
        evidence = f"evidence {row['evidence_bits']:.0f} bits"
    lost = "" if row["points_lost"] is None else f", {row['points_lost']:+.2f} points lost"
    removed = "REMOVED · " if row["removed"] else ""
    return f"{removed}{name} · {evidence}{lost} · {row['seconds']:.1f} s"
