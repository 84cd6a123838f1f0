"""The two phases of the paper's algorithm in plain PyTorch: each runs in one process or as one rank of many.

Phase 1 minimises eq. (6) on the primary task. Phase 2 minimises eq. (10),

    Σ l_WM(f^W(x), y) + λ1·‖W−W0‖² + λ2·R_DA(W),

in the verifier's graph, plus distillation from W0 on primary data. Batch norm's affine is left alone and
running statistics never see a key (design decisions 5 and 6).

Every random choice is a function of (seed, phase, step), so a checkpoint needs no generator state and a
resumed run repeats an uninterrupted one bit for bit on equal hardware and world size.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import DivergedError
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.loop import (
    average_buffers,
    evaluate,
    mixed_precision,
    one_cycle,
    require_set,
    seed_torch,
    set_lr,
    to_device,
    use_batch_statistics,
    with_strides_of,
    wrap_ddp,
)
from mtlsign.watermark.embedding.losses import add_r_func_gradient, distillation_loss, watermark_loss
from mtlsign.watermark.embedding.perturbations import Perturbations
from mtlsign.watermark.embedding.worker import State, WorkerContext
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Steps of phase 2 between checkpoints.
CHECKPOINT_STEPS = 50


def train_clean_model(
    model: nn.Module, task: Task, settings: EmbedSettings, worker: WorkerContext
) -> list[dict[str, Any]]:
    """Phase 1: minimise eq. (6) by SGD with Nesterov momentum under a one-cycle rate; u(W) is weight decay.

    Checkpoints every epoch; returns one row per epoch. Raises `ModelError` where the loss is not finite.
    """
    model.to(worker.device).to(memory_format=torch.channels_last)
    epochs, batch = require_set(settings.epochs), settings.batch
    per_epoch = task.steps("train", batch)
    task = task.to(worker.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=require_set(settings.lr),
        momentum=0.9,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    history: list[dict[str, Any]] = []
    saved = worker.load_checkpoint()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = list(saved["history"])
    net = wrap_ddp(model, worker)
    for epoch in range(len(history), epochs):
        started, seen, total, hits = time.monotonic(), 0, 0.0, 0.0
        model.train()
        batches = task.batches(
            "train",
            batch,
            epoch=epoch,
            seed=settings.seed,
            rank=worker.rank,
            world=worker.world_size,
            augment=True,
        )
        for i, (x, y) in enumerate(to_device(worker.device, batches)):
            step = epoch * per_epoch + i
            seed_torch(settings.seed, "clean", step, worker.rank)
            set_lr(optimizer, one_cycle(step, epochs * per_epoch, require_set(settings.lr)))
            optimizer.zero_grad(set_to_none=True)
            with mixed_precision(settings, worker.device):
                out = net(x)
                loss = task.loss(out, y)
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            total, seen, hits = (
                total + value * len(y),
                seen + len(y),
                hits + float(task.correct(out.detach(), y).sum()),
            )
            if i % 10 == 9:
                worker.show_progress(
                    {
                        "phase": "clean",
                        "step": step + 1,
                        "of": epochs * per_epoch,
                        "epoch": epoch + 1,
                        "loss": value,
                    }
                )
        average_buffers(model, worker)
        sums = torch.tensor([total, hits, float(seen)], dtype=torch.float64, device=worker.device)
        worker.all_reduce_sum([sums])
        row: dict[str, Any] = {
            "phase": "clean",
            "epoch": epoch + 1,
            "of": epochs,
            "loss": float(sums[0] / sums[2]),
            "train_accuracy": float(sums[1] / sums[2]),
            "validation_accuracy": evaluate(model, task, "validation", settings, worker),
            "seconds": time.monotonic() - started,
        }
        if not math.isfinite(row["loss"]):
            raise DivergedError("phase 1 diverged (the loss is not finite); lower --lr", field="lr")
        history.append(row)
        worker.report(row, lambda: _state(model, optimizer, history))
    return history


def embed_watermark(
    model: nn.Module, task: Task, detector: WatermarkDetector, settings: EmbedSettings, worker: WorkerContext
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Phase 2: write the mark into `model`, which holds W0 at the start and W at the end.

    Per step, {clean, snapshots…} are shared out over the ranks; each is one whole key batch on one rank, and
    gradients are added (decision 6). Primary batches are split as usual. Checkpoints every 50 steps.

    Returns one row per 50 steps, and the accuracies of W0 and W on the test part.
    """
    model.to(worker.device).to(memory_format=torch.channels_last).eval()
    task = task.to(worker.device)
    teacher = copy.deepcopy(model).requires_grad_(False)
    # On primary data both networks normalise by the batch, as a thief's tuning does: the mark then survives
    # tuning better (docs/results.md). W's running statistics follow its primary batches; W0's stay.
    use_batch_statistics(model, True)
    use_batch_statistics(teacher, True, momentum=0.0)
    affine = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for part in ("weight", "bias")
    }
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if name not in affine}
    for name in affine & set(parameters):
        parameters[name].requires_grad_(False)
    anchors = [p for name, p in teacher.named_parameters() if name in trained]
    head = detector.head.parameters()
    tapped = [p for name, p in trained.items() if name in detector.graph.kernels]
    deeper = [p for name, p in trained.items() if name not in detector.graph.kernels]
    groups = [{"params": [*tapped, *head], "scale": 1.0}, {"params": deeper, "scale": settings.deep_lr}]
    optimizer = torch.optim.Adam(groups, lr=require_set(settings.wm_lr), fused=True)
    history: list[dict[str, Any]] = []
    saved = worker.load_checkpoint()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for p, state in optimizer.state.items():
            state |= {name: with_strides_of(p, t) for name, t in state.items() if t.shape == p.shape}
        history = list(saved["history"])
        for p, value in zip(head, saved["head"], strict=True):
            p.data.copy_(value)
    copies = Perturbations(model, task, detector, settings, CHECKPOINT_STEPS)
    done, steps = history[-1]["step"] if history else 0, require_set(settings.steps)
    names = ("wm_loss", "wm_accuracy", "snapshot_loss", "snapshot_accuracy", "distillation_loss")
    sums = torch.zeros(2 * len(names), dtype=torch.float64, device=worker.device)
    started = time.monotonic()
    for step in range(done, steps):
        seed_torch(settings.seed, "mark", step, worker.rank)
        set_lr(optimizer, one_cycle(step, steps, require_set(settings.wm_lr)))
        optimizer.zero_grad(set_to_none=True)
        kernels = detector.graph.read(parameters)
        for term, (weight, kind) in enumerate(gradient_terms(step, settings)):
            if term % worker.world_size != worker.rank:
                continue
            scores = detector.score_kernels(copies.of(kind, kernels, step, term), differentiable=True)
            loss = watermark_loss(scores, detector.labels.float())
            (weight * loss).backward()
            _add_to_running_sum(
                sums,
                0 if kind == "clean" else 4,
                loss,
                ((scores > 0) == (detector.labels > 0)).float().mean(),
            )
            kernels = detector.graph.read(parameters)
        if settings.distillation:
            x, _ = task.batch_at(
                "train",
                settings.primary_batch,
                step,
                seed=settings.seed,
                rank=worker.rank,
                world=worker.world_size,
                augment=True,
            )
            x = x.to(worker.device)
            with mixed_precision(settings, worker.device):
                with torch.no_grad():
                    wanted = teacher(x)
                kl = distillation_loss(model(x), wanted, settings.temperature)
            (settings.distillation / worker.world_size * kl).backward()
            _add_to_running_sum(sums, 8, kl)
        grads = []
        for p in [*trained.values(), *head]:
            p.grad = torch.zeros_like(p) if p.grad is None else with_strides_of(p, p.grad)
            grads.append(p.grad)
        worker.all_reduce_sum(grads)
        deviation = add_r_func_gradient(list(trained.values()), anchors, settings.lambda1)
        optimizer.step()
        if step % 5 == 4:
            worker.show_progress(
                {"phase": "mark", "step": step + 1, "of": steps, **_running_means(sums, names)}
            )
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            worker.all_reduce_sum([sums])
            row: dict[str, Any] = {
                "phase": "mark",
                "step": step + 1,
                "of": steps,
                **_running_means(sums, names),
                "deviation_l2": deviation,
            }
            row["seconds"] = time.monotonic() - started
            average_buffers(model, worker)
            if not math.isfinite(row["wm_loss"]) or not math.isfinite(deviation):
                raise DivergedError("phase 2 diverged (the loss is not finite); lower --wm-lr", field="wm-lr")
            history.append(row)
            worker.report(row, lambda: _state(model, optimizer, history, head))
            sums.zero_()
            started = time.monotonic()
    model.requires_grad_(True).eval()
    return history, {
        "primary_clean": evaluate(teacher, task, "test", settings, worker),
        "primary_marked": evaluate(model, task, "test", settings, worker),
        "validation_clean": evaluate(teacher, task, "validation", settings, worker),
        "validation_marked": evaluate(model, task, "validation", settings, worker),
        "primary_samples": task.size("test"),
    }


def gradient_terms(step: int, settings: EmbedSettings) -> list[tuple[float, str]]:
    """The watermark gradients of one step: (weight, kind). Snapshot kinds take turns over steps."""
    if not settings.lambda2:
        return [(1.0, "clean")]
    count = settings.snapshots_per_step
    kinds = [settings.kinds[(step * count + j) % len(settings.kinds)] for j in range(count)]
    return [(1.0, "clean"), *((settings.lambda2 / count, kind) for kind in kinds)]


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    head: list[Tensor] | None = None,
) -> State:
    return {
        "model": {name: t.detach().cpu() for name, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "history": history,
        "head": [p.detach().cpu() for p in head or []],
    }


def _add_to_running_sum(sums: Tensor, at: int, *values: Tensor) -> None:
    for i, value in enumerate(values):
        sums[at + 2 * i] += value.detach().double()
        sums[at + 2 * i + 1] += 1


def _running_means(sums: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    pairs = sums.reshape(-1, 2).tolist()
    return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}
