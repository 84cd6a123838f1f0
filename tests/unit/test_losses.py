"""The terms of eq. (10), against autograd and by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.watermark.embedding.losses import (
    FineTuningLoop,
    add_r_func_gradient,
    distillation_loss,
    noise_perturbation,
    pruning_perturbation,
    watermark_loss,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_watermark_loss_is_the_mean_cross_entropy() -> None:
    scores, bits = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = sum(math.log1p(math.exp(-s)) for s in (2.0, 1.0, -0.5)) / 3
    assert float(watermark_loss(scores, bits)) == pytest.approx(expected)


def test_r_func_gradient_is_that_of_the_summed_square() -> None:
    w = [
        torch.randn(3, 2, generator=gen(1), requires_grad=True),
        torch.randn(4, generator=gen(2), requires_grad=True),
    ]
    base_weights = [torch.randn(3, 2, generator=gen(3)), torch.randn(4, generator=gen(4))]
    total = torch.stack([((a - b) ** 2).sum() for a, b in zip(w, base_weights, strict=True)]).sum()
    expected = torch.autograd.grad(0.3 * total, w)
    for p in w:
        p.grad = torch.ones_like(p)
    deviation = add_r_func_gradient(w, base_weights, 0.3)
    assert deviation == pytest.approx(float(total.detach()) ** 0.5)
    for p, g in zip(w, expected, strict=True):
        torch.testing.assert_close(p.grad, g + 1)
    assert add_r_func_gradient(w, base_weights, 0.0) == deviation
    torch.testing.assert_close(w[0].grad, expected[0] + 1)


def test_distillation() -> None:
    teacher, student = torch.randn(4, 3, generator=gen(1)), torch.randn(4, 3, generator=gen(2))
    assert float(distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    expected = 4 * float((p * (p / q).log()).sum(1).mean())
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-4)
    dense = distillation_loss(student.reshape(2, 3, 2), teacher.reshape(2, 3, 2), 1.0)
    assert dense.shape == () and float(dense) > 0


def test_noise_is_relative_to_each_tensor_and_fixed_by_its_generator() -> None:
    kernels = {"a": torch.randn(200, 50, generator=gen(1)), "b": 100 * torch.randn(200, 50, generator=gen(2))}
    out = noise_perturbation(kernels, 0.3, gen(7))
    for name, kernel in kernels.items():
        assert float((out[name] - kernel).std() / kernel.std()) == pytest.approx(0.3, rel=0.05)
    again, other = noise_perturbation(kernels, 0.3, gen(7)), noise_perturbation(kernels, 0.3, gen(8))
    assert torch.equal(out["b"], again["b"]) and not torch.equal(out["b"], other["b"])


def test_pruned_snapshots_drop_the_smallest() -> None:
    kernel = torch.randn(40, 50, generator=gen(1)).requires_grad_(True)
    ratios = []
    for seed in range(20):
        out = pruning_perturbation({"a": kernel}, 0.7, gen(seed))["a"]
        dropped = out == 0
        ratios.append(float(dropped.float().mean()))
        assert kernel[dropped].abs().max() < kernel[~dropped].abs().min()
        assert torch.equal(out[~dropped], kernel[~dropped])
    assert 0.099 < min(ratios) < 0.3 and 0.5 < max(ratios) < 0.701
    (grad,) = torch.autograd.grad(out.sum(), kernel)
    assert torch.equal(grad, (~dropped).float())


@pytest.mark.parametrize("largest", [0.0, 0.05])
def test_small_pruning_ratios(largest: float) -> None:
    out = pruning_perturbation({"a": torch.randn(100, generator=gen(1))}, largest, gen(2))["a"]
    assert int((out == 0).sum()) <= max(1, int(100 * largest))


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


def test_inner_tuning_gives_the_trajectory_of_real_sgd() -> None:
    model, seen = net(), []
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuning = tuner(model, 4, 0.1, seen)
    tuning.refresh(3)
    assert seen == [3] and tuning.refreshed == 3 and len(tuning.deltas) == 2
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
    for got, expected in zip(tuning.deltas, deltas[2:], strict=True):
        torch.testing.assert_close(got["0.weight"], expected)
        assert expected.abs().max() > 1e-3


def test_the_gradient_of_a_tuned_snapshot_is_of_first_order() -> None:
    model = net()
    tuning = tuner(model, 4, 0.1, [])
    tuning.refresh(0)
    kernels = dict(model.named_parameters())
    for turn in range(3):
        snapshot = tuning.snapshot({"0.weight": kernels["0.weight"]}, turn)["0.weight"]
        torch.testing.assert_close(snapshot, kernels["0.weight"] + tuning.deltas[turn % 2]["0.weight"])
        (grad,) = torch.autograd.grad(snapshot.square().sum(), kernels["0.weight"])
        torch.testing.assert_close(grad, 2 * snapshot)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_diverged_inner_tuning_gives_w_itself() -> None:
    model = net()
    tuning = tuner(model, 6, 1e30, [])
    tuning.refresh(0)
    kernels = {"0.weight": dict(model.named_parameters())["0.weight"]}
    assert tuning.deltas == [] and torch.equal(tuning.snapshot(kernels, 0)["0.weight"], kernels["0.weight"])
