"""Measurement of ratios: two costs from interleaved pairs A, B, A, B, … of one process, with their spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: (CPU seconds of all threads of this process, wall seconds).
Cost = tuple[float, float]


def now() -> Cost:
    """Read both clocks."""
    return time.process_time(), time.perf_counter()


def since(start: Cost) -> Cost:
    """Return the cost since `start = now()`."""
    end = now()
    return end[0] - start[0], end[1] - start[1]


def cost(work: Callable[[], object]) -> Cost:
    """Return the cost of one call."""
    start = now()
    work()
    return since(start)


@dataclass(frozen=True)
class Row:
    """One reported number. `passed` is None if there is no target."""

    name: str
    title: str
    value: float
    low: float
    high: float
    wall: float | None
    pairs: int
    target: str | None
    passed: bool | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def ratio(
    name: str,
    title: str,
    a: Sequence[Cost],
    b: Sequence[Cost],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    clock: str = "cpu",
    note: str = "",
) -> Row:
    """Compute the median of a_i / b_i over the pairs.

    Args:
        name: short name of the row.
        title: description of the ratio.
        a: costs of the first side.
        b: costs of the second side, as many.
        at_most: target of the ratio from above, if there is one.
        at_least: target of the ratio from below, if there is one.
        clock: `cpu` or `wall`: the time that the ratio is computed from.
        note: text to append to the costs.
    """
    assert len(a) == len(b) and a, "each A needs its B"
    by_cpu = [x[0] / y[0] for x, y in zip(a, b, strict=True) if y[0]] or [float("nan")]
    by_wall = [x[1] / y[1] for x, y in zip(a, b, strict=True)]
    judged = by_wall if clock == "wall" else by_cpu
    i = 1 if clock == "wall" else 0
    costs = f"{_seconds(statistics.median(x[i] for x in a))} / {_seconds(statistics.median(y[i] for y in b))}"
    best = min(x[i] for x in a) / max(min(y[i] for y in b), 1e-12)
    costs += f", best / best {best:.3f}"
    return row(
        name,
        title,
        judged,
        at_most=at_most,
        at_least=at_least,
        wall=statistics.median(by_wall),
        note="; ".join(part for part in (costs, note) if part),
    )


def row(
    name: str,
    title: str,
    values: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    wall: float | None = None,
    note: str = "",
) -> Row:
    """Compute median and spread of values and compare the median with a target.

    Args:
        name: short name of the row.
        title: description of the value.
        values: the values.
        at_most: target from above, if there is one.
        at_least: target from below, if there is one.
        wall: median of the wall times' ratios, if it was measured.
        note: text to append.
    """
    value = statistics.median(values)
    target, passed = None, None
    if at_most is not None:
        target, passed = f"<= {at_most:g}", value <= at_most
    if at_least is not None:
        target, passed = f">= {at_least:g}", value >= at_least
    return Row(name, title, value, min(values), max(values), wall, len(values), target, passed, note)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def hardware() -> dict[str, Any]:
    """Describe the machine of the measurement."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            model = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model
            )
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
