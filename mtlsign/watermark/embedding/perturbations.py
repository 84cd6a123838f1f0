"""R_DA's copies W^t, eq. (9): what is asked for the mark again at every step of phase 2.

`noise` and `pruned` change the tapped kernels at random. `tuned` is the paper's: an adversary's tuning on D'.
`scrubbed` and `spoiled` are the two attacks that a shallow mark fears most (`facts/attacks.md` §F.9, the
paper's appendix B), carried out on the tapped kernels in the verifier's graph. Gradients of the last three
are of first order: taken at W + (W^t − W) and applied to W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.tasks import Task
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.embedding.loop import require_set, seed_from, to_device
from mtlsign.watermark.embedding.losses import (
    FineTuningLoop,
    InnerLoop,
    Kernels,
    correlation_loss,
    noise_perturbation,
    pruning_perturbation,
    watermark_loss,
)
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Codes that anybody can draw: a pool, and how many of them an inner step of scrubbing takes.
CODE_POOL_SIZE, CODES_PER_STEP = 2048, 256

#: (kernels, inner step) -> what an inner attack minimises.
Loss = Callable[[Mapping[str, Tensor], int], Tensor]


class Perturbations:
    """The copies of one run of phase 2. What they are follows from (W, seed, step) alone.

    Args:
        model: the network being marked; it is only read.
        task: the primary task on the model's device.
        probe: the owner's opening.
        s: complete settings.
        window: steps after which inner attacks begin anew, so that a resumed run makes them from the same W.
    """

    def __init__(
        self, model: nn.Module, task: Task, detector: WatermarkDetector, settings: EmbedSettings, window: int
    ) -> None:
        self._probe, self._settings, self._window = detector, settings, window
        self._pool: Tensor | None = None
        self._inner: dict[str, FineTuningLoop | GradientAttackLoop] = {}
        if "tuned" in settings.kinds:

            def batches(index: int) -> Iterator[tuple[Tensor, Tensor]]:
                first, size = (
                    index * settings.inner_steps,
                    min(settings.primary_batch, len(task.splits["inner"])),
                )
                pairs = (
                    task.batch_at("inner", size, first + i, seed=settings.seed, augment=True)
                    for i in range(settings.inner_steps)
                )
                return to_device(detector.device, pairs)

            self._inner["tuned"] = FineTuningLoop(
                model, list(detector.graph.kernels), task.loss, batches,
                steps=settings.inner_steps, lr=require_set(settings.inner_lr),
            )  # fmt: skip
        for kind, objective in (("scrubbed", self._scrub), ("spoiled", self._spoil)):
            if kind in settings.kinds:
                self._inner[kind] = GradientAttackLoop(
                    objective, steps=settings.inner_steps, rate=settings.inner_rate
                )

    def of(self, kind: str, kernels: Kernels, step: int, term: int) -> Kernels:
        """The copy of `kind` for one term of one step; `clean` is W itself."""
        generator = torch.Generator().manual_seed(seed_from(self._settings.seed, kind, step, term))
        if kind == "noise":
            return noise_perturbation(kernels, self._settings.noise, generator)
        if kind == "pruned":
            return pruning_perturbation(kernels, self._settings.prune, generator)
        if kind == "clean":
            return kernels
        inner = self._inner[kind]
        index = step // self._window * self._window + step % self._window // self._settings.inner_every
        if inner.refreshed != index:
            inner.refresh(index) if isinstance(inner, FineTuningLoop) else inner.refresh(index, kernels)
        return inner.snapshot(kernels, step)

    def _scrub(self, start: Kernels, index: int) -> Loss:
        """Correlation, per coordinate, of the features over random codes with those at the start."""
        graph, spec = self._probe.graph, self._probe.spec
        if self._pool is None:
            keys = (i.to_bytes(32) for i in range(math.ceil(CODE_POOL_SIZE / spec.n)))  # nobody's keys
            drawn = [qr.images(watermark_integers(key, spec.n), spec.carrier) for key in keys]
            self._pool = torch.cat(drawn)[:CODE_POOL_SIZE].to(self._probe.device)
        pool, framed = self._pool, graph.into_frame(start)

        def loss(kernels: Mapping[str, Tensor], step: int) -> Tensor:
            gen = torch.Generator().manual_seed(seed_from(self._settings.seed, "scrubbed", index, step))
            codes = pool[torch.randperm(CODE_POOL_SIZE, generator=gen)[:CODES_PER_STEP].to(pool.device)]
            with torch.no_grad():
                before = graph.features(framed, codes).standardised
            now = graph.into_frame(kernels, differentiable_rounds=2)
            return correlation_loss(before, graph.features(now, codes).standardised)

        return loss

    def _spoil(self, start: Kernels, index: int) -> Loss:
        """The mark's own loss with labels drawn anew."""
        gen = torch.Generator().manual_seed(seed_from(self._settings.seed, "spoiled", index))
        wrong = torch.randint(2, (self._probe.spec.n,), generator=gen).float().to(self._probe.device)

        def loss(kernels: Mapping[str, Tensor], step: int) -> Tensor:
            return watermark_loss(self._probe.score_kernels(kernels, differentiable=True), wrong)

        return loss


class GradientAttackLoop(InnerLoop):
    """Adam on copies of the tapped kernels; the differences after the last half of its steps are kept.

    Args:
        objective: (kernels at the start, index) -> loss to minimise.
        steps: of Adam, per refresh.
        rate: of Adam, in units of each kernel's standard deviation.
    """

    def __init__(self, objective: Callable[[Kernels, int], Loss], *, steps: int, rate: float) -> None:
        super().__init__()
        self._objective, self._steps, self._rate = objective, steps, rate

    def refresh(self, index: int, kernels: Kernels) -> None:
        """Attack the current W anew: a function of (W, index) alone, so that a resumed run repeats it."""
        start = {name: kernel.detach() for name, kernel in kernels.items()}
        moved = {name: kernel.clone().requires_grad_(True) for name, kernel in start.items()}
        groups = [{"params": [p], "lr": self._rate * float(start[name].std())} for name, p in moved.items()]
        optimizer, loss = torch.optim.Adam(groups, foreach=False), self._objective(start, index)
        deltas = []
        for step in range(self._steps):
            with torch.enable_grad():  # of the copies alone: a trained head is the owner's, and stays right
                found = torch.autograd.grad(loss(moved, step), list(moved.values()))
            for parameter, gradient in zip(moved.values(), found, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if step + 1 > self._steps // 2 or step + 1 == self._steps:
                deltas.append({name: p.detach() - start[name] for name, p in moved.items()})
        self.keep(index, deltas)
