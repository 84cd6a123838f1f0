"""What a person reads while and after a model is attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mtlsign.reports import console

Row = Mapping[str, Any]


class Plan(Protocol):
    """One row of the table of attacks."""

    @property
    def name(self) -> str:
        """Return the names of its attacks."""

    @property
    def setting(self) -> str:
        """Return their parameters."""


class AttackLine:
    """One line per attack, rewritten while it trains."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = console.LiveLine(quiet=quiet)

    def say(self, text: str) -> None:
        """One whole line."""
        self._line.say(text)

    def tick(self, order: Plan, step: int, steps: int) -> None:
        """An attack has done `step` of `steps`."""
        self._line.show(f"{order.name} {order.setting} · step {step:,} of {steps:,}")

    def waiting(self, running: Sequence[Plan], left: int) -> None:
        """Attacks are running elsewhere."""
        names = ", ".join(order.name for order in running)
        self._line.show(f"running {names}" + (f" · {left} to come" if left else ""))

    def row(self, row: Row, number: int, of: int) -> None:
        """A finished row."""
        self._line.show(f"{number:3}/{of} {format_result(row)}", final=True)


def print_catalogue(found: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print the attacks, each on one line with its settings and defaults (`mtlsign.attacks.describe`)."""
    if as_json:
        console.print_json(found)
        return
    for title, kind in (("cost something", "removal"), ("cost nothing", "free"), ("forge", "forgery")):
        print(f"attacks that {title}:")
        rows = []
        for attack in (a for a in found if a["kind"] == kind):
            settings = " ".join(f"{k}={v}" for k, v in attack["settings"].items())
            rows.append((attack["attack"], attack["summary"] + (f" [{settings}]" if settings else "")))
        print(console.table(rows))
    print("sets: fast, standard, all; settings: NAME:KEY=VALUE,KEY=VALUE/OTHER; in sequence: NAME+NAME")


def summary(result: Mapping[str, Any]) -> str:
    """The table at the end; its last line says where the result lies."""
    rule = f"under {result['bits_required']:g} bits, at most {result['max_points_lost']:g} points lost"
    rows = [(f"{row['attack']} {row['setting']}".strip(), _cell(row)) for row in result["rows"]]
    left = ", ".join(
        f"{result[n]} {n.replace('_', ' ')}" for n in ("diverged", "not_applicable", "failed") if result[n]
    )
    head = f"{result['removed']} of {result['attacks']} attacks removed the mark ({rule})"
    if not result["marked"]:
        head = f"the model did not carry {result['bits_required']:g} bits before any attack"
    tail = f"report: {result['report']}\ntable: {result['csv']}\nresult: {result['result']}"
    return f"{head}{'; ' + left if left else ''}\n{console.table(rows)}\n{tail}"


def _cell(row: Row) -> str:
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
    """A finished row in one line, for a person."""
    name = f"{row['attack']} {row['setting']}".strip()
    if row["status"] != "ok":
        return f"{name} · {row['status'].replace('_', ' ')}: {row['reason']} · {row['seconds']:.1f} s"
    if row["verdict"] == "not_verifiable":
        found = f"not verifiable: {row['reason']}"
    else:
        found = f"{row['matches']:,} of {row['n']:,} bits agree, evidence {row['evidence_bits']:.1f} bits"
    lost = "" if row["points_lost"] is None else f", {row['points_lost']:+.2f} points lost"
    return f"{name} · {found}{lost} · {row['seconds']:.1f} s" + (" · MARK REMOVED" if row["removed"] else "")
