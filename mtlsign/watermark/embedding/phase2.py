"""Phase 2 of the paper's algorithm: embed the watermark.

It minimises eq. (10),

    Σ l_WM(f^W(x), y) + λ1·‖W−W0‖² + λ2·R_DA(W),

plus distillation from W0 on primary data (docs/decisions/0007). Watermark losses are computed in the verifier
model. BatchNorm weights and biases and embeddings are frozen. Running statistics are never updated with key
images.

Every random choice is a function of (seed, phase, step). A checkpoint therefore needs no generator state, and
a resumed run repeats an uninterrupted one bit for bit on equal hardware and world size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DivergedError
from mtlsign.models.memory_format import memory_format_for
from mtlsign.tasks import MeanMetric, Task
from mtlsign.watermark.embedding.checkpoint_identity import (
    phase2_identity,
    require_identity,
    with_identity,
)
from mtlsign.watermark.embedding.loop import (
    RunningMeans,
    average_buffers,
    evaluated_metric,
    mixed_precision,
    named_tensors,
    one_cycle,
    require_set,
    seed_torch,
    set_lr,
    use_batch_statistics,
    with_strides_of,
)
from mtlsign.watermark.embedding.losses import (
    add_r_func_gradient,
    readout_loss,
    relative_change,
    task_distillation,
)
from mtlsign.watermark.embedding.low_rank import LowRankTraining
from mtlsign.watermark.embedding.perturbations import Perturbations
from mtlsign.watermark.embedding.sharding import (
    ShardedNetwork,
    collective_state,
    gathered,
    is_sharded,
    load_whole_state,
    whole_state,
)
from mtlsign.watermark.embedding.trained_parameters import freeze_fixed_layers, phase2_optimizer
from mtlsign.watermark.embedding.worker import State, WorkerContext
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Steps between checkpoints.
CHECKPOINT_STEPS = 50
_PROGRESS_STEPS = 5
_MEANS = ("wm_loss", "wm_accuracy", "snapshot_loss", "snapshot_accuracy", "distillation_loss")


def embed_watermark(
    model: nn.Module,
    task: Task,
    detector: WatermarkDetector,
    settings: EmbedSettings,
    worker: WorkerContext,
    low_rank: LowRankTraining | None = None,
    watermark_weight: float = 1.0,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Embed the watermark into `model`, which holds W0 at the start and W at the end.

    In each step the unperturbed copy and the perturbed copies are divided among the ranks. Each copy is one
    whole key batch on one rank, and the gradients are added. Primary batches are split among ranks. A
    checkpoint is saved every 50 steps.

    Args:
        model: the network; it is changed in place.
        task: the primary task.
        detector: the owner's detector; a free head is trained in it.
        settings: complete settings.
        worker: this process of the phase.
        low_rank: the adapter whose factors are trained instead of all weights.
        watermark_weight: factor of l_WM and R_DA; 0 trains alike without a mark, as a control.

    Returns:
        One row of metrics for each 50 steps, and the accuracies of W0 and W.

    Raises:
        DivergedError: the loss or the weights are not finite.
    """
    return _Embedding(model, task, detector, settings, worker, low_rank, watermark_weight).run()


def gradient_terms(step: int, settings: EmbedSettings) -> list[tuple[float, str]]:
    """Return the watermark gradients of one step as (weight, kind). Perturbation kinds take turns."""
    if not settings.lambda2:
        return [(1.0, "clean")]
    count, kinds = settings.perturbation.per_step, require_set(settings.perturbation.kinds)
    chosen = [kinds[(step * count + index) % len(kinds)] for index in range(count)]
    return [(1.0, "clean"), *((settings.lambda2 / count, kind) for kind in chosen)]


class _Embedding:
    """Phase 2 in one process."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        detector: WatermarkDetector,
        settings: EmbedSettings,
        worker: WorkerContext,
        low_rank: LowRankTraining | None,
        watermark_weight: float,
    ) -> None:
        self._detector, self._settings, self._worker = detector, settings, worker
        self._low_rank, self._watermark_weight = low_rank, watermark_weight
        self._model = model.to(worker.device).to(memory_format=memory_format_for(model)).eval()
        self._task = task.to(worker.device)
        self._teacher = copy.deepcopy(model).requires_grad_(False)
        # On primary data both networks use the statistics of the batch, as an attacker's fine-tuning does.
        # The watermark then survives fine-tuning better. W's running statistics follow its primary batches,
        # and those of W0 do not change.
        use_batch_statistics(model, True)
        use_batch_statistics(self._teacher, True, momentum=0.0)
        self._tensors = named_tensors(model)
        self._trained = freeze_fixed_layers(model, detector)
        if low_rank is not None:
            self._trained = low_rank.attach(self._trained)
        base_parameters: dict[str, Tensor] = dict(self._teacher.named_parameters())
        self._sharded = self._shard(worker)
        if self._sharded is not None:
            base_parameters = dict(ShardedNetwork(self._teacher).local)
            self._trained = {name: self._sharded.local[name] for name in self._trained}
        self._base_parameters = [base_parameters[name] for name in self._trained]
        self._head = detector.trained_parameters
        self._steps, self._peak = require_set(settings.phase2.steps), require_set(settings.phase2.lr)
        self._optimizer = phase2_optimizer(self._trained, self._head, detector, settings, low_rank)
        self._history: list[dict[str, Any]] = []
        checkpoint = worker.load_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._perturbations = Perturbations(
            model, self._teacher, self._task, detector, settings, CHECKPOINT_STEPS
        )
        self._base_responses = self._read_base_responses()
        self._means = RunningMeans(_MEANS, worker.device)
        self._started = time.monotonic()

    def _shard(self, worker: WorkerContext) -> ShardedNetwork | None:
        """Divide the network among the ranks if the settings ask for it."""
        if not is_sharded(self._settings, worker):
            return None
        return ShardedNetwork(self._model, sum_gradients=True)

    def _restore(self, checkpoint: State) -> None:
        require_identity(checkpoint, self._identity)
        load_whole_state(self._model, self._optimizer, self._sharded, checkpoint)
        if self._low_rank is not None:
            self._low_rank.load_state(checkpoint["adapter"])
        for parameter, state in self._optimizer.state.items():
            state |= {
                name: with_strides_of(parameter, tensor)
                for name, tensor in state.items()
                if tensor.shape == parameter.shape
            }
        self._history = list(checkpoint["history"])
        for parameter, value in zip(self._head, checkpoint["head"], strict=True):
            parameter.data.copy_(value)

    def run(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Take the remaining steps; return the rows of all steps and the accuracies."""
        first_step = self._history[-1]["step"] if self._history else 0
        self._started = time.monotonic()
        for step in range(first_step, self._steps):
            seed_torch(self._settings.seed, "mark", step, self._worker.rank)
            set_lr(self._optimizer, one_cycle(step, self._steps, self._peak))
            self._optimizer.zero_grad(set_to_none=True)
            self._model.zero_grad(set_to_none=True)
            self._add_watermark_gradients(step)
            if self._settings.phase2.distillation or self._settings.phase2.task_loss:
                self._add_primary_gradient(step)
            self._sum_gradients_over_ranks()
            lambda1 = require_set(self._settings.lambda1) if self._settings.r_func == "weights" else 0.0
            deviation = add_r_func_gradient(list(self._trained.values()), self._base_parameters, lambda1)
            if self._low_rank is not None:
                self._low_rank.set_gradients()
            self._optimizer.step()
            if self._low_rank is not None:
                self._low_rank.update_weights()
            if step % _PROGRESS_STEPS == _PROGRESS_STEPS - 1:
                self._worker.show_progress(self._row(step))
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == self._steps:
                self._report(step, deviation)
        self._model.requires_grad_(True).eval()
        return self._history, self._accuracies()

    def _add_watermark_gradients(self, step: int) -> None:
        """Add the gradients of this rank's copies: l_WM, and λ2·R_DA on perturbed copies."""
        detector = self._detector
        if self._sharded is not None:
            self._tensors = self._sharded.unshard()
        for term, (weight, kind) in enumerate(gradient_terms(step, self._settings)):
            if term % self._worker.world_size != self._worker.rank:
                continue
            kernels = detector.select_weights(self._tensors)
            copy_kernels = self._perturbations.sample(kind, kernels, step, term)
            readings = detector.read(copy_kernels, differentiable=True)
            scores = detector.score(readings)
            loss = readout_loss(detector.readouts, scores, detector.labels, self._settings.phase2.margin)
            total = self._watermark_weight * weight * loss
            if kind == "clean" and self._base_responses:
                total = total + self._response_change(readings)
            total.backward()
            prefix = "wm" if kind == "clean" else "snapshot"
            self._means.add(f"{prefix}_loss", loss)
            self._means.add(f"{prefix}_accuracy", ((scores > 0) == (detector.labels > 0)).float().mean())

    def _response_change(self, readings: Sequence[Any]) -> Tensor:
        """Return λ1·R_func measured in responses."""
        changes = [relative_change(readings[index], base) for index, base in self._base_responses.items()]
        return require_set(self._settings.lambda1) * torch.stack(changes).mean()

    @torch.no_grad()
    def _read_base_responses(self) -> dict[int, Tensor]:
        """Return W0's responses by the number of a read-out; none if R_func is measured in weights.

        Read-outs of several keys share one model and its responses, which count once.
        """
        if self._settings.r_func != "responses" or not self._settings.lambda1:
            return {}
        readouts = self._detector.readouts
        with gathered(self._teacher):
            kernels = self._detector.select_weights(named_tensors(self._teacher))
            readings = self._detector.read(kernels, differentiable=True)
        spread = [index for index, readout in enumerate(readouts) if readout.spec.head.kind == "spread"]
        one_each = {id(readouts[index].model): index for index in spread}
        return {index: readings[index] for index in one_each.values()}

    def _add_primary_gradient(self, step: int) -> None:
        """Add the gradient of this rank's part of a primary batch: distillation and the primary loss."""
        settings, worker = self._settings.phase2, self._worker
        batch = self._task.batch_at(
            "train",
            settings.batch,
            step,
            seed=self._settings.seed,
            rank=worker.rank,
            world=worker.world_size,
            augment=True,
        )
        batch = batch.to(worker.device)
        with mixed_precision(self._settings, worker.device):
            outputs = self._task.training_outputs(self._model, batch)
            total = torch.zeros((), device=worker.device)
            if settings.distillation:
                with torch.no_grad():
                    teacher_outputs = self._task.training_outputs(self._teacher, batch)
                loss = task_distillation(self._task, outputs, teacher_outputs, settings.temperature)
                self._means.add("distillation_loss", loss)
                total = settings.distillation * loss
            if settings.task_loss:
                total = total + settings.task_loss * self._task.loss(outputs, batch.targets)
        (total / worker.world_size).backward()

    def _sum_gradients_over_ranks(self) -> None:
        """Add the gradients of all ranks; a parameter without a gradient gets zeros."""
        gradients = []
        summed = [] if self._sharded is not None else list(self._trained.values())
        if self._sharded is not None:
            self._sharded.pull_gradients()
        for parameter in [*summed, *self._head]:
            gradient = parameter.grad
            parameter.grad = (
                torch.zeros_like(parameter) if gradient is None else with_strides_of(parameter, gradient)
            )
            gradients.append(parameter.grad)
        self._worker.all_reduce_sum(gradients)

    def _row(self, step: int) -> dict[str, Any]:
        return {"phase": "mark", "step": step + 1, "of": self._steps, **self._means.means()}

    def _report(self, step: int, deviation: float) -> None:
        """Report the means since the last report over all ranks, and save a checkpoint."""
        if self._sharded is not None:
            square = torch.tensor([deviation**2], dtype=torch.float64, device=self._worker.device)
            self._worker.all_reduce_sum([square])
            deviation = float(square.sqrt())
        self._worker.all_reduce_sum([self._means.sums])
        row = self._row(step) | {"deviation_l2": deviation}
        row["seconds"] = time.monotonic() - self._started
        average_buffers(self._model, self._worker)
        if not math.isfinite(row["wm_loss"]) or not math.isfinite(deviation):
            raise DivergedError(
                "Phase 2 diverged: the loss is not finite. Lower --phase2.lr.", field="phase2.lr"
            )
        self._history.append(row)
        self._worker.report(row, collective_state(self._checkpoint, self._sharded))
        self._means.reset()
        self._started = time.monotonic()

    def _checkpoint(self) -> State:
        state = {
            **whole_state(self._model, self._optimizer, self._sharded),
            "history": self._history,
            "head": [parameter.detach().cpu() for parameter in self._head],
        }
        if self._low_rank is not None:
            state["adapter"] = self._low_rank.state()
        return with_identity(state, self._identity)

    @property
    def _identity(self) -> str:
        """Identity of this phase, which its checkpoints name."""
        adapter = b"" if self._low_rank is None else self._low_rank.digest
        return phase2_identity(self._settings, self._detector, adapter=adapter)

    def _accuracies(self) -> dict[str, float]:
        """Return the metric of W0 and W on the test and validation splits, and further scores on the test."""
        accuracies: dict[str, float] = {}
        for name, network in (("clean", self._teacher), ("marked", self._model)):
            parts = {
                split: evaluated_metric(network, self._task, split, self._settings, self._worker)
                for split in ("test", "validation")
            }
            accuracies[f"primary_{name}"] = parts["test"].value()
            accuracies[f"validation_{name}"] = parts["validation"].value()
            accuracies |= {f"{score}_{name}": value for score, value in parts["test"].scores().items()}
        if self._task.targets == "labels":
            accuracies["classes"] = self._task.classes
        # A binomial interval is meaningful for a mean over samples alone.
        is_mean = isinstance(self._task.metric("cpu"), MeanMetric)
        return accuracies | {"primary_samples": self._task.size("test"), "primary_is_mean": is_mean}
