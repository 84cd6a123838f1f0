"""Grid of the paper (§4.2): λ1 and λ2 in {0.02, 0.04, …, 0.20}, and the four corners of its ablation."""

from __future__ import annotations

from typing import Any

#: 0.02, 0.04, …, 0.20, rounded to the decimal numbers of the paper.
STEPS = [round(0.02 * i, 2) for i in range(1, 11)]


def paper_grid() -> dict[str, Any]:
    """Return 100 cells λ1 × λ2 on Fashion-MNIST, width 16, free head, with the R_DA of the paper."""
    return {
        "task": "fashion-mnist",
        "model": "resnet18",
        "width": 16,
        "head": "free",
        "perturbation.kinds": "fine_tuned",
        "lambda1": {"grid_search": STEPS},
        "lambda2": {"grid_search": STEPS},
    }


def paper_ablation() -> dict[str, Any]:
    """Return four cells: each regulariser on (0.1, the middle of the grid) or off, as in Fig. 5."""
    return {**paper_grid(), "lambda1": {"grid_search": [0.0, 0.1]}, "lambda2": {"grid_search": [0.0, 0.1]}}
