"""Tests of inner loops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.tasks import Batch
from mtlsign.watermark.embedding.inner_loops import FineTuningLoop
from mtlsign.watermark.embedding.losses import Kernels


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tuner(model: nn.Module, steps: int, lr: float, seen: list[int], *, adam: bool = False) -> FineTuningLoop:
    def batches(index: int) -> Iterator[Batch]:
        seen.append(index)
        for i in range(steps):
            x = torch.randn(8, 4, generator=gen(100 * index + i))
            yield Batch(x, (x[:, 0] > 0).long())

    def select(parameters: Kernels) -> dict[str, Tensor]:
        return {"0.weight": parameters["0.weight"].clone()}

    def loss(copy: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(copy(batch.inputs), batch.targets)

    return FineTuningLoop(model, select, loss, batches, steps=steps, lr=lr, adam=adam)


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


def test_fine_tuning_loop_with_adam_equals_adam_trajectory() -> None:
    model = net()
    before = model.state_dict()["0.weight"].clone()
    tuning = tuner(model, 4, 0.01, [], adam=True)
    tuning.refresh(3, {})
    twin = net().train()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    deltas = []
    for i in range(4):
        x = torch.randn(8, 4, generator=gen(300 + i))
        optimizer.zero_grad()
        F.cross_entropy(twin(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        deltas.append(twin.state_dict()["0.weight"] - before)
    assert len(tuning.deltas) == 2 and float(deltas[3].abs().max()) > 1e-3
    for delta, expected in zip(tuning.deltas, deltas[2:], strict=True):
        torch.testing.assert_close(delta["0.weight"], expected, rtol=1e-4, atol=1e-6)


def test_fine_tuning_loop_stores_differences_of_selected_kernels() -> None:
    """Differences are those of the kernels as the verifier selects them, such as with the sign of γ."""
    model = net()
    plain, flipped = tuner(model, 4, 0.1, []), tuner(model, 4, 0.1, [])
    flipped._select = lambda parameters: {"0.weight": -parameters["0.weight"]}
    for loop in (plain, flipped):
        loop.refresh(0, {})
    for one, two in zip(plain.deltas, flipped.deltas, strict=True):
        torch.testing.assert_close(one["0.weight"], -two["0.weight"])


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
