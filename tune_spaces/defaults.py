"""Candidates for the defaults, to be compared on seeds and attack settings that nothing is reported on."""

from __future__ import annotations

from typing import Any


def defaults() -> dict[str, Any]:
    """Kinds of copies and lengths of phase 2 on Fashion-MNIST at width 16, keyed head."""
    both = {"snapshots": "noise,pruned"}
    arms = [both, {**both, "prune": 0.85}, {"snapshots": "noise"}, {**both, "prune": 0.85, "steps": 1200}]
    return {"task": "fashion-mnist", "model": "resnet18", "width": 16, "arm": {"grid_search": arms}}
