"""Inner loops: short attacks on the current weights W, whose results W^t perturb W in R_DA, eq. (9).

An inner loop stores the differences W^t − W of the tapped kernels. Gradients are of first order: they are
computed at W + (W^t − W) and applied to W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mtlsign.tasks import Batch
from mtlsign.watermark.embedding.loop import named_tensors
from mtlsign.watermark.embedding.losses import Kernels

#: (kernels, inner step) -> loss that an inner attack minimises.
AttackLoss = Callable[[Kernels, int], Tensor]


class InnerLoop:
    """Stored differences W^t − W of the tapped kernels, and the perturbed copies made from them.

    Attributes:
        deltas: the differences of the last refresh.
        last_refresh: index of the last refresh, -1 before the first.
    """

    def __init__(self) -> None:
        self.deltas: list[dict[str, Tensor]] = []
        self.last_refresh = -1

    def store(self, index: int, deltas: list[dict[str, Tensor]]) -> None:
        """Store the differences of refresh `index`.

        If any value is not finite, store none; training then uses the unperturbed weights.
        """
        finite = all(bool(torch.isfinite(d).all()) for delta in deltas for d in delta.values())
        self.last_refresh, self.deltas = index, deltas if finite else []

    def perturb(self, kernels: Kernels, step: int) -> dict[str, Tensor]:
        """Return W^t, or W itself if no difference is stored.

        Args:
            kernels: the current W.
            step: chooses the difference. With n kinds in turn and n differences, a kind therefore always
                takes the same one.
        """
        if not self.deltas:
            return dict(kernels)
        delta = self.deltas[step % len(self.deltas)]
        return {name: kernel + delta[name] if name in delta else kernel for name, kernel in kernels.items()}


class FineTuningLoop(InnerLoop):
    """Fine-tuning of the current W on D', as an attacker would do it.

    Every refresh copies W, trains the copy for `steps` steps in training mode, and stores the differences
    after each step of the second half.

    Args:
        model: the network being marked; it is only read.
        select_weights: (parameters and buffers by name) -> kernels as the verifier selects them.
        loss: (copy, batch) -> loss of the attacker.
        batches: (refresh index) -> iterator of D' batches (x, y).
        steps: steps of each refresh.
        lr: learning rate.
        adam: whether the optimiser is Adam instead of SGD with momentum 0.9.
    """

    def __init__(
        self,
        model: nn.Module,
        select_weights: Callable[[Kernels], dict[str, Tensor]],
        loss: Callable[[nn.Module, Batch], Tensor],
        batches: Callable[[int], Iterator[Batch]],
        *,
        steps: int,
        lr: float,
        adam: bool,
    ) -> None:
        super().__init__()
        self._model, self._select, self._loss, self._batches = model, select_weights, loss, batches
        self._steps, self._lr, self._adam = steps, lr, adam

    def refresh(self, index: int, kernels: Kernels) -> None:
        """Fine-tune a copy of the current W.

        The result depends on (W, index) alone, so that a resumed run repeats it.

        Args:
            index: index of the refresh; it chooses the batches.
            kernels: not used; the whole network is copied.
        """
        tuned = copy.deepcopy(self._model).train()
        tuned.requires_grad_(True)
        parameters, tensors = dict(tuned.named_parameters()), named_tensors(tuned)
        optimizer: torch.optim.Optimizer
        if self._adam:
            optimizer = torch.optim.Adam(parameters.values(), lr=self._lr, fused=True)
        else:
            optimizer = torch.optim.SGD(parameters.values(), lr=self._lr, momentum=0.9, foreach=False)
        source = self._selected(named_tensors(self._model))
        deltas = []
        for step, batch in zip(range(self._steps), self._batches(index), strict=False):
            optimizer.zero_grad(set_to_none=True)
            self._loss(tuned, batch).backward()
            optimizer.step()
            if _is_stored(step, self._steps):
                current = self._selected(tensors)
                deltas.append({name: current[name] - source[name] for name in source})
        self.store(index, deltas)

    def _selected(self, tensors: Kernels) -> dict[str, Tensor]:
        """Return the kernels without a graph."""
        return self._select({name: tensor.detach() for name, tensor in tensors.items()})


class GradientAttackLoop(InnerLoop):
    """Adam on copies of the tapped kernels in the verifier model.

    Every refresh stores the differences after each step of the second half.

    Args:
        objective: (kernels at the start, refresh index) -> loss to minimise.
        steps: Adam steps of each refresh.
        lr: learning rate, in units of each kernel's standard deviation.
    """

    def __init__(self, objective: Callable[[Kernels, int], AttackLoss], *, steps: int, lr: float) -> None:
        super().__init__()
        self._objective, self._steps, self._lr = objective, steps, lr

    def refresh(self, index: int, kernels: Kernels) -> None:
        """Attack the current W.

        The result depends on (W, index) alone, so that a resumed run repeats it.

        Args:
            index: index of the refresh.
            kernels: the current W.
        """
        start = {name: kernel.detach() for name, kernel in kernels.items()}
        attacked = {name: kernel.clone().requires_grad_(True) for name, kernel in start.items()}
        groups = [{"params": [p], "lr": self._lr * float(start[name].std())} for name, p in attacked.items()]
        optimizer, loss = torch.optim.Adam(groups, foreach=False), self._objective(start, index)
        deltas = []
        for step in range(self._steps):
            # Differentiate with respect to the copies only, so that the trained head receives no gradient.
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(attacked, step), list(attacked.values()))
            for parameter, gradient in zip(attacked.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if _is_stored(step, self._steps):
                deltas.append({name: p.detach() - start[name] for name, p in attacked.items()})
        self.store(index, deltas)


def _is_stored(step: int, steps: int) -> bool:
    """Return whether the difference after a step is stored: in the second half, and after the last step."""
    return step + 1 > steps // 2 or step + 1 == steps
