"""Attacks in the space of a layer's responses: directions that natural inputs do not excite cost nothing.

The attacker knows the scheme, the marked layers and the statistics of the inputs, but not the key.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mtlsign.attacks.attacker_data import attacker_sample, attacker_view
from mtlsign.attacks.base import (
    AttackerResources,
    AttackOutcome,
    Fraction,
    LearningRate,
    NotApplicableError,
    device_of,
)
from mtlsign.attacks.distilled_tuning import Tuning, tune_by_distillation
from mtlsign.attacks.training import recalibrate_batch_norm, trainable_copy
from mtlsign.errors import ModelError
from mtlsign.models.architectures import default_taps
from mtlsign.models.attention_layers import attention_layers
from mtlsign.models.taps import last_layer, tapped_layers
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.verification.input_moments import input_moments, module_of_key
from mtlsign.watermark.verification.response_bases import supports_responses

#: Noise or change in units of a row's standard deviation or response.
Size = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
RepairSteps = Annotated[int, Field(ge=0, le=1_000_000)]
Stages = Annotated[int, Field(ge=0, le=3)]
#: Images from which the attacker computes the covariances of the inputs.
_COVARIANCE_IMAGES = 1500


class _Layers:
    """Copy of the marked model, with the eigenvectors of the covariance of each layer's inputs."""

    def __init__(self, model: nn.Module, data: Task, stages: int) -> None:
        self.model = trainable_copy(model)
        modules = dict(self.model.named_modules())
        images = attacker_sample(data, _COVARIANCE_IMAGES)
        end = _tap_of_stage(model, stages) if stages else last_layer(model, images[:2])
        layers = tapped_layers(self.model, (end,), images[:2])
        kinds = ["conv", "recurrent"]
        if attention_layers(self.model, (end,), images[:2]):
            kinds.append("linear")
        self.names = [
            layer.key
            for layer in layers
            if supports_responses(layer, modules) and layer.kind in kinds and layer.key != end
        ]
        if not self.names:
            raise NotApplicableError(
                "The network has no convolution of two dimensions, recurrent or attention layer.",
                field="model",
            )
        self._modules = modules
        self._moments = input_moments(self.model, (end,), images, self.names)

    def kernel(self, name: str) -> nn.Parameter:
        """Return the kernel of a layer."""
        module, leaf = module_of_key(self._modules, name)
        weight = getattr(module, leaf)
        assert isinstance(weight, nn.Parameter)
        return weight

    def rows(self, name: str) -> Tensor:
        """Return a kernel's rows, float64 [groups, O/groups, fan-in]."""
        groups = int(getattr(module_of_key(self._modules, name)[0], "groups", 1))
        weight = self.kernel(name).detach().double()
        return weight.reshape(groups, len(weight) // groups, -1)

    def set_rows(self, name: str, rows: Tensor) -> None:
        """Write rows back into the kernel."""
        with torch.no_grad():
            weight = self.kernel(name)
            weight.copy_(rows.reshape(weight.shape).to(weight.dtype))

    def mean(self, name: str) -> Tensor:
        """Return the mean input, float64 [groups, fan-in]."""
        return self._moments[name].mean

    def spectrum(self, name: str) -> tuple[Tensor, Tensor]:
        """Return eigenvalues [groups, fan-in], largest first, and eigenvectors as columns."""
        covariance = self._moments[name].covariance
        ridge = 1e-9 * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-30)
        eye = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device)
        vectors, values, _ = torch.linalg.svd(covariance + ridge * eye)
        return values, vectors


def _tap_of_stage(model: nn.Module, stages: int) -> str:
    """Return the module whose output ends the first `stages` stages."""
    try:
        return default_taps(model, "free")[stages - 1]
    except ModelError as error:
        raise NotApplicableError(error.detail, field="stages") from None


def null_space(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    energy: Fraction = 0.97,
    noise: Size = 0.0,
    stages: Stages = 0,
    repair_steps: RepairSteps = 0,
    repair_lr: LearningRate = 1e-3,
) -> AttackOutcome:
    """Keep of every kernel the directions with `energy` of the inputs' variance; put noise into the others.

    The noise has `noise` times the standard deviation of each kernel. `stages` limits the attack to the first
    stages; 0 attacks all convolutions. Nothing is trained unless `repair_steps` are given.
    """
    data = attacker_view(model, task, resources, seed)
    layers, gen = _Layers(model, data, stages), seeded_generator("mtlsign/attack/null-space", seed)
    for name in layers.names:
        values, vectors = layers.spectrum(name)
        rank = int((values.sum(0).cumsum(0) / values.sum() < energy).sum()) + 1
        basis = vectors[:, :, :rank]
        rows = layers.rows(name)
        projected = rows @ basis @ basis.transpose(1, 2)
        if noise:
            drawn = torch.randn(rows.shape, generator=gen, dtype=torch.float64).to(rows.device)
            drawn = drawn * rows.std() * noise
            projected = projected + drawn - drawn @ basis @ basis.transpose(1, 2)
        layers.set_rows(name, projected)
    return _repaired(model, layers.model, data, resources, seed, repair_steps, repair_lr)


def response_noise(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    size: Size = 0.3,
    ridge: Fraction = 1e-4,
    stages: Stages = 0,
    repair_steps: RepairSteps = 0,
    repair_lr: LearningRate = 1e-3,
) -> AttackOutcome:
    """Add noise that is large where natural inputs are weak: `size` times the response of each row.

    In the eigenvectors of the inputs' covariance the noise is proportional to 1/√(λ + ridge·λ_max).
    """
    data = attacker_view(model, task, resources, seed)
    layers, gen = _Layers(model, data, stages), seeded_generator("mtlsign/attack/response-noise", seed)
    for name in layers.names:
        values, vectors = layers.spectrum(name)
        rows = layers.rows(name)
        response = ((rows @ vectors).square() * values[:, None]).sum(2, keepdim=True).sqrt()
        drawn = torch.randn(rows.shape, generator=gen, dtype=torch.float64).to(rows.device)
        shaped = drawn * (values + ridge * values[:, :1]).rsqrt()[:, None] / rows.shape[2] ** 0.5
        layers.set_rows(name, rows + (size * response * shaped) @ vectors.transpose(1, 2))
    return _repaired(model, layers.model, data, resources, seed, repair_steps, repair_lr)


def mean_shift(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    size: Size = 0.1,
) -> AttackOutcome:
    """Add random multiples of one direction to each layer's rows; batch norms remove most of the effect.

    Along the mean input divided by the covariance, the mean of a response changes most relative to its
    deviation. The deviation that is added is `size` times that of each row's response.
    """
    data = attacker_view(model, task, resources, seed)
    layers, gen = _Layers(model, data, 0), seeded_generator("mtlsign/attack/mean-shift", seed)
    for name in layers.names:
        values, vectors = layers.spectrum(name)
        coordinates = vectors.transpose(1, 2) @ layers.mean(name).unsqueeze(2)
        direction = vectors @ (coordinates / (values + 1e-4 * values[:, :1])[:, :, None])
        added = ((vectors.transpose(1, 2) @ direction).square() * values[:, :, None]).sum(1, keepdim=True)
        rows = layers.rows(name)
        response = ((rows @ vectors).square() * values[:, None]).sum(2, keepdim=True)
        drawn = torch.randn((*rows.shape[:2], 1), generator=gen, dtype=torch.float64).to(rows.device)
        scale = size * (response / added.clamp(min=1e-30)).sqrt()
        layers.set_rows(name, rows + drawn * scale * direction.transpose(1, 2))
    return AttackOutcome(recalibrate_batch_norm(layers.model, data))


def low_rank(
    model: nn.Module,
    task: Task,
    resources: AttackerResources,
    seed: int,
    *,
    share: Fraction = 0.5,
    repair_steps: RepairSteps = 0,
    repair_lr: LearningRate = 1e-3,
) -> AttackOutcome:
    """Keep the largest singular values of each convolution's kernel matrix: a `share` of them."""
    data = attacker_view(model, task, resources, seed)
    layers = _Layers(model, data, 0)
    for name in layers.names:
        left, values, right = torch.linalg.svd(layers.rows(name), full_matrices=False)
        rank = max(1, int(share * values.shape[1]))
        low = (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]
        layers.set_rows(name, low)
    return _repaired(model, layers.model, data, resources, seed, repair_steps, repair_lr)


def _repaired(
    model: nn.Module,
    attacked: nn.Module,
    data: Task,
    resources: AttackerResources,
    seed: int,
    steps: int,
    lr: LearningRate,
) -> AttackOutcome:
    """Recalibrate batch norms, and distil from the marked model for some steps."""
    recalibrate_batch_norm(attacked, data)
    if not steps:
        return AttackOutcome(attacked.to(device_of(model)))
    tuning = Tuning(steps, resources.learning_rate(lr))
    return tune_by_distillation(attacked.requires_grad_(True), model, data, resources, seed, tuning)
