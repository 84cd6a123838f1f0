from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run


@torch.no_grad()
def test_noise_has_standard_deviation_of_sigma(module: nn.Module, tiny_task: Task) -> None:
    for sigma in (0.2, 0.4):
        noisy = dict(run(f"noise:sigma={sigma}", module, tiny_task).model.named_parameters())
        for name, p in module.named_parameters():
            if p.dim() < 2:
                assert torch.equal(p, noisy[name]), name
            elif p.numel() > 500:
                assert float((noisy[name] - p).std() / p.std()) == pytest.approx(sigma, rel=0.15), name
