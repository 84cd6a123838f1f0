"""Tests of the terms of eq. (10), against autograd and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mtlsign.watermark.embedding.losses import (
    add_r_func_gradient,
    distillation_loss,
    margin_loss,
    noise_perturbation,
    pruning_perturbation,
    relative_change,
    watermark_loss,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_watermark_loss_equals_mean_cross_entropy() -> None:
    scores, bits = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = sum(math.log1p(math.exp(-s)) for s in (2.0, 1.0, -0.5)) / 3
    assert float(watermark_loss(scores, bits)) == pytest.approx(expected)


def test_margin_loss_equals_mean_squared_shortfall() -> None:
    scores = torch.tensor([3.0, 1.0, -3.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    bits = torch.tensor([1, 1, 0, 0, 0], dtype=torch.uint8)
    loss = margin_loss(scores, bits, 2.0)
    assert float(loss.detach()) == pytest.approx((0 + 1 + 0 + 2.5**2 + 1.5**2) / 5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.tolist() == pytest.approx([0, -2 / 5, 0, 2 * 2.5 / 5, 2 * 1.5 / 5])
    assert float(margin_loss(torch.tensor([2.0, -2.0]), torch.tensor([1, 0]), 2.0)) == 0
    assert torch.equal(margin_loss(scores, bits.double(), 2.0), loss)


def test_relative_change_is_squared_relative_distance() -> None:
    base = torch.randn(50, generator=gen(1))
    assert float(relative_change(base, base)) == 0
    assert float(relative_change(1.1 * base, base)) == pytest.approx(0.01, rel=1e-3)
    moved = base + torch.randn(50, generator=gen(2))
    expected = float((moved - base).norm() / base.norm()) ** 2
    assert float(relative_change(moved, base)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(relative_change(7 * moved, 7 * base), relative_change(moved, base))


def test_add_r_func_gradient_equals_gradient_of_summed_square() -> None:
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


def test_distillation_loss_equals_scaled_divergence() -> None:
    teacher, student = torch.randn(4, 3, generator=gen(1)), torch.randn(4, 3, generator=gen(2))
    assert float(distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = F.softmax(teacher / 2, 1), F.softmax(student / 2, 1)
    expected = 4 * float((p * (p / q).log()).sum(1).mean())
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-4)
    dense = distillation_loss(student.reshape(2, 3, 2), teacher.reshape(2, 3, 2), 1.0)
    assert dense.shape == () and float(dense) > 0


def test_noise_perturbation_is_relative_and_reproducible() -> None:
    kernels = {"a": torch.randn(200, 50, generator=gen(1)), "b": 100 * torch.randn(200, 50, generator=gen(2))}
    out = noise_perturbation(kernels, 0.3, gen(7))
    for name, kernel in kernels.items():
        assert float((out[name] - kernel).std() / kernel.std()) == pytest.approx(0.3, rel=0.05)
    again, other = noise_perturbation(kernels, 0.3, gen(7)), noise_perturbation(kernels, 0.3, gen(8))
    assert torch.equal(out["b"], again["b"]) and not torch.equal(out["b"], other["b"])


def test_pruning_perturbation_drops_smallest_weights() -> None:
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
def test_pruning_perturbation_with_small_ratio_drops_few_weights(largest: float) -> None:
    out = pruning_perturbation({"a": torch.randn(100, generator=gen(1))}, largest, gen(2))["a"]
    assert int((out == 0).sum()) <= max(1, int(100 * largest))


@pytest.mark.parametrize("values", [False, True])
def test_distillation_loss_of_one_output_is_relative_squared_error(values: bool) -> None:
    teacher = torch.tensor([[0.0], [2.0]])
    assert float(distillation_loss(teacher + 1, teacher, 2.0, values=values)) == pytest.approx(1.0)
    assert float(distillation_loss(100 * (teacher + 1), 100 * teacher, 2.0)) == pytest.approx(1.0)


def test_distillation_loss_of_independent_labels_sees_a_common_shift() -> None:
    teacher = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert float(distillation_loss(teacher + 10, teacher, 2.0)) == pytest.approx(0.0, abs=1e-5)
    assert float(distillation_loss(teacher + 10, teacher, 2.0, values=True)) > 1


def test_distillation_loss_selects_logits_of_mappings() -> None:
    logits = torch.randn(4, 3)
    assert float(distillation_loss({"logits": logits}, (logits, None), 2.0)) == pytest.approx(0.0, abs=1e-6)
