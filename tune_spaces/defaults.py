"""Candidates for the defaults, to be compared on seeds and attack settings that nothing is reported on."""

from __future__ import annotations

from typing import Any


def defaults() -> dict[str, Any]:
    """Kinds of copies on Fashion-MNIST at width 16, keyed head."""
    kinds = ("noise,pruned,scrubbed", "noise,pruned,scrubbed,spoiled", "noise,pruned", "noise")
    return {
        "task": "fashion-mnist", "model": "resnet18", "width": 16, "prune": 0.85,
        "snapshots": {"grid_search": list(kinds)},
    }  # fmt: skip
