"""Fan, Ng and Chan 2019 and 2021, "Rethinking Deep Neural Network Ownership Verification" (arXiv 1909.07830).

A passport layer is a convolution whose batch norm takes scale and shift from secret inputs, the passports:
the spatial means of the convolution of each passport. Signs of the scales are the signature. This is scheme
V2 of the paper: the published network has ordinary batch norms, and shares its kernels with a private branch
with passport layers, which is trained along and used for verification alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes.base import Access, Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.comparator import BitsKey, Comparator, bits_from_seed
from mtlsign.schemes.detection import unreadable
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.passport_layers import PassportLayer, draw_passports, passport_layers
from mtlsign.schemes.training import evaluation_mode, train_watermark
from mtlsign.schemes.trigger_marks import logits_of
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.embedding.worker import WorkerContext

#: Weight of the squares of the scales in the sign loss of the authors' code.
_SCALE_PENALTY = 1e-5
#: Samples in a step of the false claim.
_FORGING_BATCH = 64


@dataclass(frozen=True)
class PassportKey(BitsKey):
    """Passports of some layers, the signature, and samples that measure the private branch.

    Attributes:
        layers: passport layers, from the last one backwards.
        scales: passports of the scales, float32 [1, in, H, W] for each layer.
        shifts: passports of the shifts, of the same shapes.
        bits: the signature, float32 [n]; one bit for each channel, in order, as far as they reach.
        inputs: labelled images, float32 [samples, C, H, W].
        classes: int64 [samples].
    """

    layers: tuple[PassportLayer, ...]
    scales: tuple[Tensor, ...] = field(repr=False)
    shifts: tuple[Tensor, ...] = field(repr=False)
    bits: Tensor = field(repr=False)
    inputs: Tensor = field(repr=False)
    classes: Tensor = field(repr=False)

    @property
    def sample_count(self) -> int:
        """No inputs: the sign loss reads weights and passports alone."""
        return 0


@dataclass(frozen=True)
class PassportScheme(Comparator[PassportKey]):
    """Scheme V2 of Fan et al.

    Attributes:
        strength: weight of the sign loss, alpha of the paper.
        threshold: size that a scale must reach, gamma 0 of the paper.
        passport_images: training images from whose activations each passport is composed.
        samples: labelled images that measure the private branch.
        tolerance: fraction of these images by which the private branch may fall behind the public one.
        forging_steps: steps of the false claim.
    """

    name: ClassVar[str] = "passports"
    access: ClassVar[Access] = "white-box"
    needs_commitment: ClassVar[bool] = True

    strength: float = 0.1
    threshold: float = 0.1
    passport_images: int = 20
    samples: int = 500
    tolerance: float = 0.05
    forging_steps: int = 200

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> PassportKey:
        """Choose the last layers that suffice for the bits, and compose passports from activations.

        Raises:
            ModelError: the task does not classify images, or the model has too few batch norms after
                convolutions.
        """
        if not isinstance(task.input_spec, ImageSpec) or task.targets != "labels":
            raise ModelError("Passports are made from images. Use a task that classifies images.",
                             field="task")  # fmt: skip
        layers = passport_layers(model, task.input_spec.sample(2), self.key_size)
        generator = seeded_generator("mtlsign/passports", seed)
        rows = torch.randperm(task.size("train"), generator=generator)
        images = task.splits["train"].batch(rows[: 2 * self.passport_images]).inputs
        rows = torch.randperm(task.size("validation"), generator=generator)[: self.samples]
        inputs, classes = task.splits["validation"].batch(rows)
        halves = images[: self.passport_images], images[self.passport_images :]
        scales, shifts = (draw_passports(model, layers, half, generator) for half in halves)
        bits = bits_from_seed("mtlsign/passports/bits", seed, self.key_size)
        return PassportKey(layers, scales, shifts, bits, inputs.cpu(), classes.cpu())

    def scores(self, model: nn.Module, key: PassportKey) -> Tensor:
        """Return the scales of the passport layers, channel by channel, [n]."""
        scales = [layer.response(model, p) for layer, p in zip(key.layers, key.scales, strict=True)]
        return torch.cat(scales)[: len(key.bits)]

    def private_outputs(self, model: nn.Module, key: PassportKey, inputs: Tensor) -> Tensor:
        """Return the logits of the private branch, with gradients: [samples, classes].

        Batch statistics and running statistics are those of the network, as in the authors' code.

        Args:
            model: the network.
            key: its key.
            inputs: images on the network's device, [samples, C, H, W].

        Raises:
            ModelError: the model lacks a passport layer.
        """
        replaced: dict[str, Tensor] = {}
        for layer, scale, shift in zip(key.layers, key.scales, key.shifts, strict=True):
            replaced[f"{layer.norm}.weight"] = layer.response(model, scale)
            replaced[f"{layer.norm}.bias"] = layer.response(model, shift)
        return default_logits(functional_call(model, replaced, (inputs,)))

    def bit_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the sign loss: the sum of the shortfalls of signed scales, and a small penalty on scales."""
        signs = labels.to(scores) * 2 - 1
        return F.relu(self.threshold - signs * scores).sum() + _SCALE_PENALTY * scores.square().sum()

    def term(self, model: nn.Module, key: PassportKey, step: int) -> Tensor:
        """Return alpha times the sign loss."""
        return self.strength * super().term(model, key, step)

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: PassportKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Train both branches on the same batches, and the sign loss; see `WatermarkScheme.embed`."""

        def objective(step: int, batch: Batch) -> Tensor:
            public = task.loss(model(batch.inputs), batch.targets)
            private = task.loss(self.private_outputs(model, key, batch.inputs), batch.targets)
            return public + private + self.term(model, key, step)

        return train_watermark(
            model, task, settings, worker, objective=objective, optimizer=self.optimizer(settings),
            key_inputs=min(settings.batch, task.size("train")),
        )  # fmt: skip

    @torch.no_grad()
    def private_accuracy(self, model: nn.Module, key: PassportKey) -> tuple[float, float]:
        """Return the accuracies of the private and of the public branch on the key's samples, 0 to 1.

        Raises:
            ModelError: the model lacks a passport layer, or does not accept the samples.
        """
        with evaluation_mode(model):
            private = logits_of(_PrivateBranch(self, model, key), key.inputs)
            public = logits_of(model, key.inputs)
        classes = key.classes.to(public.device)
        return _accuracy(private, classes), _accuracy(public, classes)

    def verify(
        self, model: nn.Module, key: PassportKey, tensors: Mapping[str, Tensor] | None = None
    ) -> Detection:
        """Compare signs, and demand that the private branch performs the task.

        The network itself is read and run, not `tensors`. See `WatermarkScheme.verify`.
        """
        detection = super().verify(model, key)
        if detection.status == "not_verifiable":
            return detection
        try:
            private, public = self.private_accuracy(model, key)
        except ModelError as error:
            return unreadable(len(key.bits), self.null_rate(key), error.detail)
        if private >= public - self.tolerance:
            return detection
        reason = f"With the passports the accuracy is {private:.3f} instead of {public:.3f}."
        return replace(detection, accepted=False, status="rejected", reason=reason)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Train counterfeit passports for a message of the claimant's choice; the model stays as it is."""

        def detect() -> Detection:
            return self.verify(model, self._counterfeit(model, task, seed))

        return computed_key("passports trained on the model", detect)

    def _counterfeit(self, model: nn.Module, task: Task, seed: int) -> PassportKey:
        """Return passports that give the model's function and the message of a seed."""
        key = self.generate_key(model, task, seed)
        device = next(model.parameters()).device
        scales, shifts = (
            tuple(p.to(device).clone().requires_grad_(True) for p in passports)
            for passports in (key.scales, key.shifts)
        )
        forged = replace(key, scales=scales, shifts=shifts)
        optimizer = torch.optim.Adam([*scales, *shifts], lr=0.03)
        batch = min(_FORGING_BATCH, task.size("train"))
        with evaluation_mode(model), frozen(model):
            for step in range(self.forging_steps):
                data = task.batch_at("train", batch, step, seed=seed, augment=False).to(device)
                loss = task.loss(self.private_outputs(model, forged, data.inputs), data.targets)
                optimizer.zero_grad(set_to_none=True)
                (loss + self.term(model, forged, step)).backward()
                optimizer.step()
        return replace(
            key,
            scales=tuple(p.detach() for p in scales),
            shifts=tuple(p.detach() for p in shifts),
        )


class _PrivateBranch(nn.Module):
    """Private branch as a network."""

    def __init__(self, scheme: PassportScheme, model: nn.Module, key: PassportKey) -> None:
        super().__init__()
        self.model, self._scheme, self._key = model, scheme, key

    def forward(self, inputs: Tensor) -> Tensor:
        return self._scheme.private_outputs(self.model, self._key, inputs)


def _accuracy(logits: Tensor, classes: Tensor) -> float:
    return float((logits.argmax(1) == classes).float().mean())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model require gradients inside the block."""
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
