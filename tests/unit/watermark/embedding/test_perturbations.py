"""Tests of the perturbations of R_DA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtlsign.models import loading
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import losses, perturbations, phase2
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.watermark.embedding.phase_helpers import (
    Maker,
    Settings,
    assert_equal,
)


@pytest.mark.parametrize("kind", ["decorrelated", "spoiled"])
def test_sample_of_inner_attack_raises_loss_and_leaves_model_unchanged(
    kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    s = tiny_settings(
        lambda2=1.0, **{"phase2.steps": 60, "perturbation.kinds": kind, "perturbation.inner_steps": 12}
    )
    model, detector = tiny_model(), detector_of(s)
    phase2.embed_watermark(
        model, tiny_task, detector, s.model_copy(update={"lambda2": 0.0}), SingleProcessContext()
    )
    before = loading.cpu_state(model)
    kernels = detector.select_weights(dict(model.named_parameters()))
    bits = detector.labels.float()

    def loss(of: Any) -> float:
        return float(losses.watermark_loss(detector.score_kernels(of), bits).detach())

    teacher = tiny_model()
    copies = perturbations.Perturbations(model, teacher, tiny_task, detector, s, 50)
    attacked = [copies.sample(kind, kernels, step, 1) for step in (49, 0, 1, s.perturbation.refresh_steps)]
    assert all(loss(copy) > loss(kernels) + 0.01 for copy in attacked)
    sizes = [{n: float((c[n] - k).detach().norm()) for n, k in kernels.items()} for c in attacked[1:]]
    assert sizes[0] != sizes[1] and all(size > 0 for found in sizes for size in found.values())
    fresh = perturbations.Perturbations(model, teacher, tiny_task, detector, s, 50)
    again = fresh.sample(kind, kernels, 0, 1)
    assert all(torch.equal(again[n], attacked[1][n]) for n in kernels)
    assert_equal(loading.cpu_state(model), before)
    grads = torch.autograd.grad(
        detector.score_kernels(again, differentiable=True).sum(), list(kernels.values())
    )
    assert all(torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)


@pytest.mark.parametrize("kind", ["decorrelated", "spoiled"])
def test_sample_of_inner_attack_gives_no_gradient_to_trained_head(
    kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    s = tiny_settings(lambda2=1.0, head="free", **{"perturbation.kinds": kind, "perturbation.inner_steps": 2})
    model, detector = tiny_model(), detector_of(s)
    assert detector.trained_parameters
    kernels = detector.select_weights(dict(model.named_parameters()))
    perturbations.Perturbations(model, tiny_model(), tiny_task, detector, s, 50).sample(kind, kernels, 0, 1)
    parameters = [*detector.trained_parameters, *model.parameters()]
    assert all(p.grad is None for p in parameters)
