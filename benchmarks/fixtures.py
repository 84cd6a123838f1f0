"""Setup of the benchmarks: task, untrained network, key and settings. Costs hardly depend on the weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import architectures, loading
from mtlsign.models.taps import forward_to_taps
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference

#: Settings of `BenchmarkSetup.create` as they travel to a child process: task, data, width.
Options = dict[str, str | int | None]


@dataclass
class BenchmarkSetup:
    """One task, one network and one key."""

    settings: EmbedSettings
    task: Task
    model: nn.Module
    detector: WatermarkDetector
    opening: KeyOpening
    reference: Reference

    @classmethod
    def create(cls, task: str, data: str | None, width: int | None, **options: object) -> BenchmarkSetup:
        """Load the task, and make an untrained network and a key that is not kept.

        The head is keyed unless `options` name another, because most benchmarks time passes on key images.

        Args:
            task: name of the task, as for jobs/embed.py.
            data: folder of the datasets; None for tasks that need none.
            width: channels of the first stage; None for the default of the task.
            **options: any of `EmbedSettings`.
        """
        values = {"task": task, "data": data, "width": width, "insecure_test_key": True}
        values |= {"head": "keyed", **options}
        settings = EmbedSettings.of(
            {name: value for name, value in values.items() if value is not None}
        ).with_defaults()
        loaded = load_task(settings.task, data=settings.data, download=False, seed=settings.seed)
        architecture = loading.architecture_from_settings(settings, loaded.input_spec)
        torch.manual_seed(0)
        model = architectures.build(architecture)
        (opening,), reference = commit_keys(
            architectures.build(architecture),
            loading.cpu_state(model),
            architecture,
            loaded.input_spec,
            settings,
            Identity.generate(),
            bases=measure_response_bases(
                architectures.build(architecture), loading.cpu_state(model), loaded, settings
            ),
        )
        return cls(settings, loaded, model, WatermarkDetector(opening, reference), opening, reference)

    def with_sizes(self, **sizes: int) -> Task:
        """Return the task with at most the given number of samples in the named splits."""
        splits = dict(self.task.splits)
        for name, size in sizes.items():
            split = splits[name]
            splits[name] = replace(split, rows=split.rows[:size])  # type: ignore[type-var, attr-defined]
        return replace(self.task, splits=splits)

    def __str__(self) -> str:
        settings, shape = self.settings, tuple(self.detector.feature_readout.inputs.shape)
        return (
            f"{settings.task}, {settings.model}, width {settings.width}, key set {shape}, "
            f"primary batch {settings.phase2.batch}"
        )


class BareForward:
    """Forward and backward passes of phase 2 alone: no canonical form, loss, optimizer or data loading.

    The tapped part runs on the key batch, with BatchNorm in training mode, and stops after the last tap. The
    student runs forward and backward, and the teacher forward, on one primary batch. Both normalise by the
    batch, as in phase 2. Gradients go to the tensors that phase 2 trains.
    """

    def __init__(self, setup: BenchmarkSetup) -> None:
        readout = setup.detector.feature_readout
        self._taps, self._images = readout.model.taps, readout.inputs
        self._tapped = copy.deepcopy(setup.model).train()
        self._student = copy.deepcopy(setup.model).train()
        self._teacher = copy.deepcopy(setup.model).train().requires_grad_(False)
        for net in (self._tapped, self._student, self._teacher):
            net.to(memory_format=torch.channels_last)  # the faster layout on CPUs, as the package uses it
        for net in (self._tapped, self._student):
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.requires_grad_(False)
        self._x, _ = setup.task.batch_at("train", setup.settings.phase2.batch, 0, seed=0)
        self._gradients: dict[tuple[int, ...], Tensor] = {}

    def _backward(self, outputs: list[Tensor]) -> None:
        seeds = [self._gradients.setdefault(tuple(o.shape), torch.full_like(o, 1e-6)) for o in outputs]
        torch.autograd.backward(outputs, seeds)

    def run_key_batch(self) -> None:
        """Run the tapped part forward and backward on the key set."""
        self._backward(forward_to_taps(self._tapped, self._images, self._taps))

    @torch.no_grad()
    def run_key_forward(self) -> None:
        """Run the tapped part forward on the key set."""
        forward_to_taps(self._tapped, self._images, self._taps)

    def run_primary_batch(self) -> None:
        """Run the teacher forward and the student forward and backward on the primary batch."""
        with torch.no_grad():
            self._teacher(self._x)
        self._backward([self._student(self._x)])

    def run_step(self, key_batches: int) -> None:
        """Run the passes of one step of phase 2 with `key_batches` watermark gradients."""
        self._tapped.zero_grad(set_to_none=True)
        self._student.zero_grad(set_to_none=True)
        for _ in range(key_batches):
            self.run_key_batch()
        self.run_primary_batch()
