"""What every benchmark needs: task, network, key, settings. Weights are random: costs hardly depend on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import architectures, loading
from mtlsign.models.taps import forward_to_taps
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference


@dataclass
class Scene:
    """One task, one network, one key."""

    settings: EmbedSettings
    task: Task
    model: nn.Module
    detector: WatermarkDetector
    opening: KeyOpening
    reference: Reference

    @classmethod
    def of(cls, task: str, data: str | None, width: int | None, **options: object) -> Scene:
        """Load the task and make an untrained network and a throw-away key."""
        wanted = {"task": task, "data": data, "width": width, "insecure_test_key": True, **options}
        settings = EmbedSettings.of(
            {name: value for name, value in wanted.items() if value is not None}
        ).resolved()
        loaded = load_task(settings.task, data=settings.data, download=False, seed=settings.seed)
        shape = loading.InputSpec(loaded.channels, loaded.height, loaded.width, loaded.classes)
        graph = loading.architecture_from_settings(settings, shape)
        torch.manual_seed(0)
        model = architectures.build(graph)
        geometry = (loaded.channels, loaded.height, loaded.width)
        opening, reference = pipeline.commit_key(
            architectures.build(graph),
            loading.cpu_state(model),
            graph,
            geometry,
            settings,
            Identity.generate(),
        )
        return cls(settings, loaded, model, WatermarkDetector(opening, reference), opening, reference)

    def fewer(self, **sizes: int) -> Task:
        """The same task with only so many samples in some splits."""
        splits = dict(self.task.splits)
        for name, size in sizes.items():
            split = splits[name]
            splits[name] = replace(split, rows=split.rows[:size])  # type: ignore[type-var, attr-defined]
        return replace(self.task, splits=splits)

    def __str__(self) -> str:
        s, shape = self.settings, tuple(self.detector.images.shape)
        return f"{s.task}, {s.model}, width {s.width}, key set {shape}, primary batch {s.primary_batch}"


class Bare:
    """Forwards and backwards alone: plain modules, channels last, no frame, no loss, no optimiser, no data.

    The tapped part runs on the key batch with plain batch norm in training mode and stops after the last tap;
    the student runs forward and backward and the teacher forward on one primary batch, both normalising by
    the batch as in phase 2. Gradients go to the tensors that phase 2 trains.
    """

    def __init__(self, scene: Scene) -> None:
        self._taps, self._images = scene.detector.graph.taps, scene.detector.images
        self._tapped = copy.deepcopy(scene.model).train()
        self._student = copy.deepcopy(scene.model).train()
        self._teacher = copy.deepcopy(scene.model).train().requires_grad_(False)
        for net in (self._tapped, self._student, self._teacher):
            net.to(memory_format=torch.channels_last)  # the faster layout on CPUs, as the package uses it
        for net in (self._tapped, self._student):
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.requires_grad_(False)
        self._x, _ = scene.task.batch_at("train", scene.settings.primary_batch, 0, seed=0)
        self._ones: dict[tuple[int, ...], Tensor] = {}

    def _backward(self, outputs: list[Tensor]) -> None:
        seeds = [self._ones.setdefault(tuple(o.shape), torch.full_like(o, 1e-6)) for o in outputs]
        torch.autograd.backward(outputs, seeds)

    def key_batch(self) -> None:
        """Forward and backward of the tapped part on the key set."""
        self._backward(forward_to_taps(self._tapped, self._images, self._taps))

    @torch.no_grad()
    def key_forward(self) -> None:
        """Forward of the tapped part on the key set."""
        forward_to_taps(self._tapped, self._images, self._taps)

    def primary(self) -> None:
        """Teacher's forward, student's forward and backward."""
        with torch.no_grad():
            self._teacher(self._x)
        self._backward([self._student(self._x)])

    def step(self, key_batches: int) -> None:
        """The parts of one step of phase 2 with `key_batches` watermark gradients."""
        self._tapped.zero_grad(set_to_none=True)
        self._student.zero_grad(set_to_none=True)
        for _ in range(key_batches):
            self.key_batch()
        self.primary()
