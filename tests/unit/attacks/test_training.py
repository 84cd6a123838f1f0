from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtlsign.attacks import AttackDivergedError, AttackerResources
from mtlsign.attacks.training import optimize


def test_optimize_calls_hooks_in_order_and_reports_progress() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    calls: list[object] = []

    def loss_fn(step: int) -> Tensor:
        calls.append(("loss", step))
        return parameter.square().sum()

    resources = AttackerResources(on_step=lambda step, steps: calls.append((step, steps)))
    optimize(
        loss_fn, [parameter], 2, 0.5, resources, optimizer_class=torch.optim.SGD,
        lr_at=lambda step: 0.25 * (step + 1), after_step=lambda: calls.append("after"),
    )  # fmt: skip
    assert calls == [("loss", 0), "after", (1, 2), ("loss", 1), "after", (2, 2)]
    # w - 2 lr w with rates of 0.25 and 0.5
    assert float(parameter.detach()) == 0.0


def test_optimize_with_infinite_loss_raises_diverged_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AttackDivergedError, match="step 1"):
        optimize(lambda _: parameter.sum() * math.inf, [parameter], 3, 0.1, AttackerResources())
