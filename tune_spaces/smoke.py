"""Smallest space that sweeps both weights: four short cells on the digits of scikit-learn."""

from __future__ import annotations

from typing import Any


def smoke() -> dict[str, Any]:
    """Return four cells, lambda1 x lambda2, with few samples and steps, to check that a sweep runs."""
    return {
        "task": "digits",
        "model": "resnet18",
        "width": 16,
        "key_size": 128,
        "phase1.epochs": 2,
        "phase2.steps": 20,
        "lambda1": {"grid_search": [0.02, 0.2]},
        "lambda2": {"grid_search": [0.0, 1.0]},
    }
