"""Phase 1 of the paper's algorithm: train the clean network on the primary task, eq. (6).

Every random choice is a function of (seed, phase, step). A checkpoint therefore needs no generator state, and
a resumed run repeats an uninterrupted one bit for bit on equal hardware and world size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DivergedError
from mtlsign.models.memory_format import memory_format_for
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.metrics import Metric
from mtlsign.watermark.embedding.checkpoint_identity import (
    phase1_identity,
    require_identity,
    with_identity,
)
from mtlsign.watermark.embedding.loop import (
    average_buffers,
    evaluate,
    mixed_precision,
    one_cycle,
    require_set,
    seed_torch,
    set_lr,
    to_device,
    wrap_ddp,
)
from mtlsign.watermark.embedding.sharding import (
    ShardedNetwork,
    collective_state,
    is_sharded,
    load_whole_state,
    whole_state,
)
from mtlsign.watermark.embedding.worker import State, WorkerContext

_PROGRESS_STEPS = 10


def train_clean_model(
    model: nn.Module, task: Task, settings: EmbedSettings, worker: WorkerContext
) -> list[dict[str, Any]]:
    """Minimise eq. (6) by SGD with Nesterov momentum, or Adam, under a one-cycle schedule.

    u(W) is weight decay.

    A checkpoint is saved after every epoch.

    Args:
        model: the network; it is trained in place.
        task: the primary task.
        settings: complete settings.
        worker: this process of the phase.

    Returns:
        One row of metrics for each epoch.

    Raises:
        DivergedError: the loss is not finite.
    """
    return _CleanTraining(model, task, settings, worker).run()


class _CleanTraining:
    """Phase 1 in one process."""

    def __init__(self, model: nn.Module, task: Task, settings: EmbedSettings, worker: WorkerContext) -> None:
        self._settings, self._worker = settings, worker
        self._model = model.to(worker.device).to(memory_format=memory_format_for(model))
        self._task = task.to(worker.device)
        self._epochs, self._peak = require_set(settings.phase1.epochs), require_set(settings.phase1.lr)
        self._batch_size = require_set(settings.phase1.batch)
        self._steps_per_epoch = task.steps("train", self._batch_size)
        checkpoint = worker.load_checkpoint()
        if checkpoint is None:
            task.initialize(model)
        self._sharded = ShardedNetwork(model) if is_sharded(settings, worker) else None
        parameters = model.parameters() if self._sharded is None else self._sharded.local.values()
        self._optimizer = _build_optimizer(parameters, settings)
        self._history: list[dict[str, Any]] = []
        if checkpoint is not None:
            require_identity(checkpoint, phase1_identity(settings))
            load_whole_state(model, self._optimizer, self._sharded, checkpoint)
            self._history = list(checkpoint["history"])
        self._network = model if self._sharded is not None else wrap_ddp(model, worker)

    def run(self) -> list[dict[str, Any]]:
        """Train the remaining epochs; return the rows of all epochs."""
        for epoch in range(len(self._history), self._epochs):
            row = self._train_epoch(epoch)
            if not math.isfinite(row["loss"]):
                raise DivergedError(
                    "Phase 1 diverged: the loss is not finite. Lower --phase1.lr.", field="phase1.lr"
                )
            self._history.append(row)
            self._worker.report(row, collective_state(self._checkpoint, self._sharded))
        return self._history

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch; return its row of metrics over all ranks."""
        started, sample_count, loss_sum = time.monotonic(), 0, 0.0
        metric = self._task.metric(self._worker.device)
        self._model.train()
        for index, batch in enumerate(self._batches(epoch)):
            loss = self._train_step(epoch * self._steps_per_epoch + index, batch, metric)
            loss_sum, sample_count = loss_sum + loss * len(batch), sample_count + len(batch)
            if index % _PROGRESS_STEPS == _PROGRESS_STEPS - 1:
                self._show_progress(epoch, index, loss)
        average_buffers(self._model, self._worker)
        sums = torch.tensor([loss_sum, float(sample_count)], dtype=torch.float64, device=self._worker.device)
        self._worker.all_reduce_sum([sums, metric.state])
        return {
            "phase": "clean",
            "epoch": epoch + 1,
            "of": self._epochs,
            "loss": float(sums[0] / sums[1]),
            # Detectors detect nothing while they are trained.
            **({"train_accuracy": metric.value()} if bool(metric.state.any()) else {}),
            "validation_accuracy": evaluate(
                self._model, self._task, "validation", self._settings, self._worker
            ),
            "seconds": time.monotonic() - started,
        }

    def _batches(self, epoch: int) -> Any:
        batches = self._task.batches(
            "train",
            self._batch_size,
            epoch=epoch,
            seed=self._settings.seed,
            rank=self._worker.rank,
            world=self._worker.world_size,
            augment=True,
        )
        return to_device(self._worker.device, batches)

    def _train_step(self, step: int, batch: Batch, metric: Metric) -> float:
        """Take one step of the optimiser, update the metric, and return the loss of this rank's part."""
        seed_torch(self._settings.seed, "clean", step, self._worker.rank)
        set_lr(self._optimizer, one_cycle(step, self._epochs * self._steps_per_epoch, self._peak))
        self._optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self._settings, self._worker.device):
            out = self._task.training_outputs(self._network, batch)
            loss = self._task.loss(out, batch.targets)
        loss.backward()
        if self._sharded is not None:
            self._sharded.pull_gradients()
        self._optimizer.step()
        metric.update(tree_map_only(Tensor, Tensor.detach, out), batch.targets)
        return float(loss.detach())

    def _show_progress(self, epoch: int, index: int, loss: float) -> None:
        steps = self._epochs * self._steps_per_epoch
        step = epoch * self._steps_per_epoch + index + 1
        self._worker.show_progress(
            {"phase": "clean", "step": step, "of": steps, "epoch": epoch + 1, "loss": loss}
        )

    def _checkpoint(self) -> State:
        state = {"history": self._history, **whole_state(self._model, self._optimizer, self._sharded)}
        return with_identity(state, phase1_identity(self._settings))


def _build_optimizer(parameters: Iterable[nn.Parameter], settings: EmbedSettings) -> torch.optim.Optimizer:
    """Return the optimizer of phase 1. Runs of earlier versions name none: they used SGD."""
    peak, decay = require_set(settings.phase1.lr), require_set(settings.phase1.weight_decay)
    if settings.phase1.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=peak, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=peak, momentum=0.9, nesterov=True, weight_decay=decay)
