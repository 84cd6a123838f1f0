"""The terms of the paper's objective, eq. (10), and the distillation that protects the task (decision 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: What perturbs tapped kernels before the mark is asked for again: kernels -> kernels of W^t.
Kernels = Mapping[str, Tensor]


def watermark_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """l_WM of eq. (7): mean cross-entropy of N scores (logits) against N bits, float32 [N] each."""
    return F.binary_cross_entropy_with_logits(scores, labels)


def correlation_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean over coordinates of the squared correlation of standardised features, float32 [n, d] each."""
    return (a * b).mean(0).square().mean()


def add_r_func_gradient(parameters: Sequence[Tensor], anchors: Sequence[Tensor], lambda1: float) -> float:
    """Add the gradient of λ1·R_func = λ1·Σ‖W−W0‖² (eq. 8) to `.grad` in closed form; returns ‖W−W0‖₂."""
    squares = []
    with torch.no_grad():
        for w, base_weights in zip(parameters, anchors, strict=True):
            delta = w - base_weights
            flat = delta.reshape(-1)
            squares.append(torch.dot(flat, flat))
            if lambda1:
                assert w.grad is not None
                w.grad.add_(delta, alpha=2 * lambda1)
        return float(torch.stack(squares).double().sum().sqrt())  # one wait for the device, not one a tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) at temperature T, mean over batch and positions: logits [B, K, ...] each."""
    p = F.log_softmax(teacher.float() / temperature, 1)
    q = F.log_softmax(student.float() / temperature, 1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()
    return kl * temperature**2


def noise_perturbation(kernels: Kernels, sigma: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Gaussian noise of `sigma` times each tensor's standard deviation. The generator lives on the CPU."""
    out = {}
    for name, kernel in kernels.items():
        noise = torch.randn(kernel.shape, generator=generator).to(kernel.device)
        out[name] = kernel + noise * (sigma * kernel.detach().std())
    return out


def pruning_perturbation(kernels: Kernels, largest: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Each tensor's smallest weights set to 0, one ratio for all, uniform in [min(0.1, largest), largest]."""
    low = min(0.1, largest)
    ratio = low + (largest - low) * float(torch.rand((), generator=generator))
    out = {}
    for name, kernel in kernels.items():
        magnitude = kernel.detach().abs().flatten()
        cut = torch.kthvalue(magnitude, max(1, int(ratio * magnitude.numel()))).values
        out[name] = kernel * (kernel.detach().abs() > cut)
    return out


class InnerLoop:
    """Differences W^t − W of the tapped kernels that an inner loop left, and the copies that they make."""

    def __init__(self) -> None:
        self.deltas: list[dict[str, Tensor]] = []
        self.refreshed = -1

    def keep(self, index: int, deltas: list[dict[str, Tensor]]) -> None:
        """What refresh `index` left; where it diverged nothing, for no snapshot is better than NaN."""
        finite = all(bool(torch.isfinite(d).all()) for delta in deltas for d in delta.values())
        self.refreshed, self.deltas = index, deltas if finite else []

    def snapshot(self, kernels: Kernels, turn: int) -> dict[str, Tensor]:
        """W^t (W itself where the loop diverged). `turn` picks one of the differences kept: callers give the
        step, so that with n kinds in turn and n differences each kind always takes the same one.
        """
        if not self.deltas:
            return dict(kernels)
        delta = self.deltas[turn % len(self.deltas)]
        return {name: kernel + delta[name] if name in delta else kernel for name, kernel in kernels.items()}


class FineTuningLoop(InnerLoop):
    """R_DA's W^t, eq. (9): an adversary's tuning of the current W on D', whose trajectory gives the
    snapshots.

    Every refresh copies W, trains the copy for `steps` SGD steps in training mode as an adversary would, and
    keeps the differences W^t − W of the tapped kernels after the last half of the steps. The gradient is of
    first
    order: taken at W + (W^t − W) and applied to W.

    Args:
        model: the network being marked; it is only read.
        names: tapped kernels.
        loss: the primary loss.
        batches: call it with a refresh index for an iterator of D' batches (x, y).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss: Callable[[Tensor, Tensor], Tensor],
        batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
        *,
        steps: int,
        lr: float,
    ) -> None:
        super().__init__()
        self._model, self._names, self._loss, self._batches = model, list(names), loss, batches
        self._steps, self._lr = steps, lr

    def refresh(self, index: int) -> None:
        """Tune anew from the current W. A function of (W, index) alone, so that a resumed run repeats it."""
        import copy

        copied = copy.deepcopy(self._model).train()
        copied.requires_grad_(True)
        parameters = dict(copied.named_parameters())
        optimizer = torch.optim.SGD(parameters.values(), lr=self._lr, momentum=0.9, foreach=False)
        source = dict(self._model.named_parameters())
        deltas = []
        for step, (x, y) in zip(range(self._steps), self._batches(index), strict=False):
            optimizer.zero_grad(set_to_none=True)
            self._loss(copied(x), y).backward()
            optimizer.step()
            if step + 1 > self._steps // 2 or step + 1 == self._steps:
                deltas.append({n: (parameters[n].detach() - source[n].detach()) for n in self._names})
        self.keep(index, deltas)
