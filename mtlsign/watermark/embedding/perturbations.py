"""Perturbations of R_DA, eq. (9): copies W^t on which every step of phase 2 requires the watermark again.

`noise` and `pruned` change the tapped kernels at random. `fine_tuned` is the paper's: an attacker's tuning on
D'. `decorrelated` and `spoiled` are the two attacks that remove a first-stage watermark at the lowest cost
(docs/attacks.md; paper, Appendix B), on the tapped kernels in the verifier model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.tasks import Batch, Task
from mtlsign.watermark import carriers
from mtlsign.watermark.embedding.inner_loops import AttackLoss, FineTuningLoop, GradientAttackLoop
from mtlsign.watermark.embedding.loop import mixed_precision, require_set, seed_from, to_device
from mtlsign.watermark.embedding.losses import (
    Kernels,
    correlation_loss,
    noise_perturbation,
    pruning_perturbation,
    readout_loss,
    task_distillation,
)
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Inputs of public keys: size of the pool, and how many of them an inner step of `decorrelated` takes.
CODE_POOL_SIZE, CODES_PER_STEP = 2048, 256
#: Words for the kinds in random seeds. They are the first names of the kinds and must not change, because
#: losses at a fixed seed depend on them.
SEED_LABELS = {"fine_tuned": "tuned", "decorrelated": "scrubbed"}


class Perturbations:
    """Perturbed copies of one run of phase 2. They depend on (W, seed, step) alone.

    Args:
        model: the network being marked; it is only read.
        teacher: W0, from which `fine_tuned` may distil.
        task: the primary task on the model's device.
        detector: the owner's detector.
        settings: complete settings.
        window: steps after which inner loops restart, so that a resumed run makes them from the same W.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        task: Task,
        detector: WatermarkDetector,
        settings: EmbedSettings,
        window: int,
    ) -> None:
        self._detector, self._settings, self._window = detector, settings, window
        self._task, self._teacher = task, teacher
        self._pool: Tensor | None = None
        self._inner: dict[str, FineTuningLoop | GradientAttackLoop] = {}
        perturbation = settings.perturbation
        kinds, inner_steps = require_set(perturbation.kinds), require_set(perturbation.inner_steps)
        if not settings.lambda2:
            kinds = ()
        if "fine_tuned" in kinds:
            self._inner["fine_tuned"] = FineTuningLoop(
                model,
                detector.select_weights,
                self._tuning_loss,
                self._inner_batches,
                steps=inner_steps,
                lr=require_set(perturbation.tuning_lr),
                adam=perturbation.tuning_optimizer == "adam",
            )
        for kind, objective in (
            ("decorrelated", self._decorrelation_loss),
            ("spoiled", self._spoiling_loss),
        ):
            if kind in kinds:
                self._inner[kind] = GradientAttackLoop(
                    objective, steps=inner_steps, lr=perturbation.attack_lr
                )

    def sample(self, kind: str, kernels: Kernels, step: int, term: int) -> Kernels:
        """Return a perturbed copy.

        Args:
            kind: a perturbation kind, or `clean` for W itself.
            kernels: the current W.
            step: step of phase 2.
            term: number of the gradient term within the step.
        """
        settings = self._settings.perturbation
        if kind == "clean":
            return kernels
        if kind in self._inner:
            return self._attacked(kind, kernels, step)
        generator = self._generator(kind, step, term)
        if kind == "noise":
            return noise_perturbation(kernels, settings.noise_sigma, generator)
        assert kind == "pruned", kind
        return pruning_perturbation(kernels, settings.max_prune_ratio, generator)

    def _attacked(self, kind: str, kernels: Kernels, step: int) -> Kernels:
        """Return a copy from an inner loop, which is refreshed when its interval or the window has passed."""
        inner = self._inner[kind]
        window_start, offset = step // self._window * self._window, step % self._window
        index = window_start + offset // require_set(self._settings.perturbation.refresh_steps)
        if inner.last_refresh != index:
            inner.refresh(index, kernels)
        return inner.perturb(kernels, step)

    def _generator(self, kind: str, *numbers: int) -> torch.Generator:
        label = SEED_LABELS.get(kind, kind)
        return torch.Generator().manual_seed(seed_from(self._settings.seed, label, *numbers))

    def _inner_batches(self, index: int) -> Iterator[Batch]:
        """Return the batches of D' for one refresh."""
        settings, steps = self._settings, require_set(self._settings.perturbation.inner_steps)
        size = min(settings.phase2.batch, len(self._task.splits["inner"]))
        batches = (
            self._task.batch_at("inner", size, index * steps + offset, seed=settings.seed, augment=True)
            for offset in range(steps)
        )
        return to_device(self._detector.device, batches)

    def _tuning_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of an attacker who tunes on D': the primary loss, and distillation if it is set."""
        settings = self._settings
        with mixed_precision(settings, self._detector.device):
            outputs = self._task.training_outputs(model, batch)
            loss = self._task.loss(outputs, batch.targets)
            if settings.perturbation.tuning_distillation:
                with torch.no_grad():
                    teacher_outputs = self._task.training_outputs(self._teacher, batch)
                kl = task_distillation(self._task, outputs, teacher_outputs, settings.phase2.temperature)
                loss = loss + settings.perturbation.tuning_distillation * kl
        return loss

    def _decorrelation_loss(self, start: Kernels, index: int) -> AttackLoss:
        """Build the correlation per coordinate of features over public key inputs with those at the start."""
        model, pool = self._detector.feature_readout.model, self._code_pool()
        canonical_start = model.canonicalize(start)

        def loss(kernels: Kernels, step: int) -> Tensor:
            generator = self._generator("decorrelated", index, step)
            chosen = torch.randperm(CODE_POOL_SIZE, generator=generator)[:CODES_PER_STEP]
            codes = pool[chosen.to(pool.device)]
            with torch.no_grad():
                features_at_start = model.features(canonical_start, codes).standardised
            canonical = model.canonicalize(kernels, differentiable_rounds=2)
            return correlation_loss(features_at_start, model.features(canonical, codes).standardised)

        return loss

    def _code_pool(self) -> Tensor:
        """Return the inputs of public keys, which do not depend on the owner's key."""
        if self._pool is None:
            spec = self._detector.spec
            carrier = carriers.for_spec(spec)
            keys = (i.to_bytes(32) for i in range(math.ceil(CODE_POOL_SIZE / spec.n)))
            inputs = [carrier.inputs(watermark_integers(key, spec.n)) for key in keys]
            self._pool = torch.cat(inputs)[:CODE_POOL_SIZE].to(self._detector.device)
        return self._pool

    def _spoiling_loss(self, start: Kernels, index: int) -> AttackLoss:
        """Build the watermark loss with random labels."""
        generator = self._generator("spoiled", index)
        labels = torch.randint(2, (len(self._detector.labels),), generator=generator).float()
        labels, margin = labels.to(self._detector.device), self._settings.phase2.margin

        def loss(kernels: Kernels, step: int) -> Tensor:
            scores = self._detector.score_kernels(kernels, differentiable=True)
            return readout_loss(self._detector.readouts, scores, labels, margin)

        return loss
