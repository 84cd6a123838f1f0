"""Candidates for the default perturbations; seeds and attacks of the reports are not used to choose them."""

from __future__ import annotations

from typing import Any


def defaults() -> dict[str, Any]:
    """Return kinds of perturbations on Fashion-MNIST at width 16, keyed head."""
    kinds = ("noise,pruned,decorrelated", "noise,pruned,decorrelated,spoiled", "noise,pruned", "noise")
    return {
        "task": "fashion-mnist", "model": "resnet18", "width": 16, "head": "keyed",
        "perturbation.max_prune_ratio": 0.85,
        "perturbation.kinds": {"grid_search": list(kinds)},
    }  # fmt: skip
