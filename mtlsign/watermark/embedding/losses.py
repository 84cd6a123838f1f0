"""Terms of the objective, eq. (10), distillation for the primary task, and random perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtlsign.tasks import Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.watermark.verification.readouts import Readout

#: Tapped kernels by name.
Kernels = Mapping[str, Tensor]


def watermark_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return l_WM of eq. (7): the mean cross-entropy of N scores (logits) and N bits, float32 [N] each."""
    return F.binary_cross_entropy_with_logits(scores, labels)


def margin_loss(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the mean squared shortfall of signed scores from a margin; l_WM of a spread head.

    Args:
        scores: [N], in standard deviations of an unmarked network's scores.
        labels: bits, [N] of 0 and 1.
        margin: m; a bit whose signed score reaches m costs nothing.
    """
    signs = labels.to(scores.dtype) * 2 - 1
    return F.relu(margin - signs * scores).square().mean()


def readout_loss(readouts: Sequence[Readout], scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the sum of the losses of all read-outs.

    Args:
        readouts: the detector's read-outs.
        scores: joined scores [N].
        labels: joined bits [N].
        margin: see `margin_loss`.
    """
    sizes = [readout.spec.n for readout in readouts]
    parts = zip(readouts, scores.split(sizes), labels.split(sizes), strict=True)
    losses = [
        margin_loss(part, bits, margin)
        if readout.spec.head.kind == "spread"
        else watermark_loss(part, bits.float())
        for readout, part, bits in parts
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def relative_change(responses: Tensor, base_responses: Tensor) -> Tensor:
    """Return ‖z − z0‖²/‖z0‖²: R_func (eq. 8) measured in the marked layers' responses, [D] each."""
    return (responses - base_responses).square().sum() / base_responses.square().sum()


def correlation_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared correlation over coordinates of standardised features, float32 [n, d] each."""
    return (a * b).mean(0).square().mean()


def add_r_func_gradient(
    parameters: Sequence[Tensor], base_parameters: Sequence[Tensor], lambda1: float
) -> float:
    """Add the gradient of λ1·R_func = λ1·Σ‖W−W0‖² (eq. 8) to `.grad` in closed form.

    Args:
        parameters: W; each has a gradient unless λ1 is 0.
        base_parameters: W0, in the same order.
        lambda1: weight of R_func.

    Returns:
        ‖W−W0‖₂.
    """
    squares = []
    with torch.no_grad():
        for parameter, base_parameter in zip(parameters, base_parameters, strict=True):
            delta = parameter - base_parameter
            flat = delta.reshape(-1)
            squares.append(torch.dot(flat, flat))
            if lambda1:
                assert parameter.grad is not None
                parameter.grad.add_(delta, alpha=2 * lambda1)
        # One stack, so that the host waits for the device once and not once for each tensor.
        return float(torch.stack(squares).double().sum().sqrt())


def distillation_loss(student: Any, teacher: Any, temperature: float, *, values: bool = False) -> Tensor:
    """Return the distance of a student's outputs from its teacher's.

    It is T²·KL(teacher ‖ student) at temperature T, as the mean over batch and positions. A single output, or
    outputs without a softmax, would leave it blind; then it is the mean squared error, in units of the
    teacher's variance over the batch.

    Args:
        student: logits [B, K, ...], or outputs of which `default_logits` selects them.
        teacher: as `student`.
        temperature: T.
        values: whether the outputs are real numbers or independent labels instead of classes.
    """
    student, teacher = default_logits(student).float(), default_logits(teacher).float()
    if values or student.ndim < 2 or student.shape[1] == 1:
        variance = teacher.var(correction=0)
        scale = torch.where(variance > 0, variance, torch.ones_like(variance))
        squared_error: Tensor = (student - teacher).square().mean()
        return squared_error / scale
    p = F.log_softmax(teacher / temperature, 1)
    q = F.log_softmax(student / temperature, 1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()
    divergence: Tensor = kl * temperature**2
    return divergence


def task_distillation(task: Task, student: Any, teacher: Any, temperature: float) -> Tensor:
    """Return `distillation_loss` of two networks' outputs as the task reads them.

    Args:
        task: the primary task.
        student: outputs of the student.
        teacher: outputs of the teacher.
        temperature: T.
    """
    values = task.targets in ("binary", "values")
    return distillation_loss(task.logits_of(student), task.logits_of(teacher), temperature, values=values)


def noise_perturbation(kernels: Kernels, sigma: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Add Gaussian noise to each tensor.

    Args:
        kernels: the current W.
        sigma: standard deviation of the noise, in units of each tensor's.
        generator: a generator on the CPU.
    """
    perturbed = {}
    for name, kernel in kernels.items():
        noise = torch.randn(kernel.shape, generator=generator).to(kernel.device)
        perturbed[name] = kernel + noise * (sigma * kernel.detach().std())
    return perturbed


def pruning_perturbation(kernels: Kernels, largest: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Set the smallest weights of each tensor to 0.

    Args:
        kernels: the current W.
        largest: largest ratio. One ratio for all tensors is drawn from [min(0.1, largest), largest].
        generator: a generator on the CPU.
    """
    low = min(0.1, largest)
    ratio = low + (largest - low) * float(torch.rand((), generator=generator))
    perturbed = {}
    for name, kernel in kernels.items():
        magnitude = kernel.detach().abs().flatten()
        cut = torch.kthvalue(magnitude, max(1, int(ratio * magnitude.numel()))).values
        perturbed[name] = kernel * (kernel.detach().abs() > cut)
    return perturbed
