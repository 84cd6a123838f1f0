"""Tests of inner loops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.watermark.embedding.inner_loops import FineTuningLoop


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tuner(model: nn.Module, steps: int, lr: float, seen: list[int]) -> FineTuningLoop:
    def batches(index: int) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(index)
        for i in range(steps):
            x = torch.randn(8, 4, generator=gen(100 * index + i))
            yield x, (x[:, 0] > 0).long()

    return FineTuningLoop(model, ["0.weight"], F.cross_entropy, batches, steps=steps, lr=lr)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()


def test_fine_tuning_loop_equals_sgd_trajectory() -> None:
    model, seen = net(), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuning = tuner(model, 4, 0.1, seen)
    tuning.refresh(3, {})
    assert seen == [3] and tuning.last_refresh == 3 and len(tuning.deltas) == 2
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()) and not model.training
    twin = net().train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    deltas = []
    for i in range(4):
        x = torch.randn(8, 4, generator=gen(300 + i))
        optimizer.zero_grad()
        F.cross_entropy(twin(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        deltas.append(twin.state_dict()["0.weight"] - before["0.weight"])
    for delta, expected in zip(tuning.deltas, deltas[2:], strict=True):
        torch.testing.assert_close(delta["0.weight"], expected)
        assert expected.abs().max() > 1e-3


def test_fine_tuning_loop_gradient_is_of_first_order() -> None:
    model = net()
    tuning = tuner(model, 4, 0.1, [])
    tuning.refresh(0, {})
    kernels = dict(model.named_parameters())
    for step in range(3):
        perturb = tuning.perturb({"0.weight": kernels["0.weight"]}, step)["0.weight"]
        torch.testing.assert_close(perturb, kernels["0.weight"] + tuning.deltas[step % 2]["0.weight"])
        (grad,) = torch.autograd.grad(perturb.square().sum(), kernels["0.weight"])
        torch.testing.assert_close(grad, 2 * perturb)
    assert not any(p.grad is not None for p in model.parameters())


def test_fine_tuning_loop_after_divergence_returns_w() -> None:
    model = net()
    tuning = tuner(model, 6, 1e30, [])
    tuning.refresh(0, {})
    kernels = {"0.weight": dict(model.named_parameters())["0.weight"]}
    assert tuning.deltas == [] and torch.equal(tuning.perturb(kernels, 0)["0.weight"], kernels["0.weight"])
