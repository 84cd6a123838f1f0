"""The smallest space that still sweeps both weights: four short cells on the embedded digits."""

from __future__ import annotations

from typing import Any


def smoke() -> dict[str, Any]:
    """Four cells, lambda1 x lambda2, few samples, epochs and steps: it shows that a sweep runs, no more."""
    return {
        "task": "digits",
        "model": "resnet18",
        "width": 16,
        "key_size": 128,
        "epochs": 2,
        "steps": 20,
        "lambda1": {"grid_search": [0.02, 0.2]},
        "lambda2": {"grid_search": [0.0, 1.0]},
    }
