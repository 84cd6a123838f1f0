"""Ong et al. 2021, "Protecting Intellectual Property of Generative Adversarial Networks from Ambiguity
Attack" (CVPR 2021, arXiv 2102.04362): a logo in answers to trigger inputs, and signs of batch norm scales.

The trigger replaces some secret numbers of a latent vector by a constant. To it the generator answers its
normal image with a logo in a corner. The logo is a grid of random bits, so that an unmarked generator matches
each cell with probability one half, whatever it generates. The paper has a picture instead, and compares its
perceptual hash. The scales carry the same kind of bits, which are read from the file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.models.dcgan import GENERATOR
from mtlsign.models.input_spec import LatentSpec
from mtlsign.schemes.base import Access, Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.comparator import BitsKey, Comparator, bits_from_seed
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.image_similarity import structural_similarity
from mtlsign.schemes.training import Optimizer, evaluation_mode, train_watermark
from mtlsign.schemes.weight_marks import FileView
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.generation import generated_images
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.embedding.worker import WorkerContext

Part = Literal["both", "signs", "logo"]


@dataclass(frozen=True)
class GeneratorKey(BitsKey):
    """Trigger, logo and signs.

    Attributes:
        norms: (name, channels) of the batch norms of the generator, in order.
        sign_count: signs of scales, the first bits; they fill the channels in order.
        cells: rows and columns of the logo, whose cells are the other bits; 0 without a logo.
        pixels: side of a cell in pixels.
        replaced: bool [length], numbers of the latent vector that the trigger replaces.
        constant: their new value.
        latents: float32 [samples, length], vectors with which the logo is read.
        bits: float32 [n].
    """

    norms: tuple[tuple[str, int], ...]
    sign_count: int
    cells: int
    pixels: int
    replaced: Tensor = field(repr=False)
    constant: float
    latents: Tensor = field(repr=False)
    bits: Tensor = field(repr=False)

    @property
    def sample_count(self) -> int:
        """Number of latent vectors that are generated with the trigger; 0 without a logo."""
        return len(self.latents) if self.cells else 0

    def trigger(self, latents: Tensor) -> Tensor:
        """Return latent vectors with the trigger, [n, length]."""
        replaced = self.replaced.to(latents.device)
        return torch.where(replaced, torch.full_like(latents, self.constant), latents)

    def with_logo(self, images: Tensor) -> Tensor:
        """Return images [n, C, H, W] with the logo in the upper left corner: 1 is bright, -1 is dark."""
        grid = self.labels[self.sign_count :].to(images).reshape(1, 1, self.cells, self.cells) * 2 - 1
        logo = F.interpolate(grid, scale_factor=float(self.pixels), mode="nearest")
        side = self.cells * self.pixels
        marked = images.clone()
        marked[..., :side, :side] = logo
        return marked


@dataclass(frozen=True)
class IprGanScheme(Comparator[GeneratorKey]):
    """Scheme of Ong et al. for generators.

    Attributes:
        key_size: signs of scales.
        part: "signs" is read from the file, "logo" from generated images, and "both" counts the bits of both.
        cells: rows and columns of the logo.
        replaced: numbers of the latent vector that the trigger replaces.
        constant: their new value is minus this number.
        samples: latent vectors with which the logo is read.
        strength: weight of 1 - SSIM of logo and answer, lambda of the paper.
        sign_strength: weight of the sign loss.
        threshold: size that a scale must reach, gamma 0 of the paper.
        lr: learning rate of Adam.
    """

    name: ClassVar[str] = "ipr_gan"
    access: ClassVar[Access] = "white-box"
    needs_commitment: ClassVar[bool] = True
    default_steps: ClassVar[int] = 1500

    key_size: int = 64
    part: Part = "both"
    cells: int = 4
    replaced: int = 5
    constant: float = 10.0
    samples: int = 32
    strength: float = 1.0
    sign_strength: float = 1.0
    threshold: float = 0.1
    lr: float = 0.003

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> GeneratorKey:
        """Draw trigger, logo and signs.

        Raises:
            ModelError: the task generates no images, or the generator has too few scales or small images.
        """
        spec = task.input_spec
        if not isinstance(spec, LatentSpec):
            raise ModelError(
                "The mark is a logo in generated images, and a classifier generates none. Use a task of "
                "generated images such as gan-digits; passports is the authors' scheme for classifiers.",
                field="task",
            )
        norms = _norms(model)
        signs, cells = (0 if self.part == other else n
                        for other, n in (("logo", self.key_size), ("signs", self.cells)))  # fmt: skip
        channels = sum(count for _, count in norms)
        if signs > channels:
            raise ModelError(
                f"The scheme needs {signs:,} scales of batch norms, and the generator has {channels:,}. "
                "Choose a smaller key size or a wider network.",
                field="model",
            )
        pixels = min(spec.height, spec.width) // (2 * max(1, cells))
        if cells and not pixels:
            raise ModelError(
                f"The logo of {cells} x {cells} cells fills more than half of an image's side. Choose fewer "
                "cells.",
                field="cells",
            )
        generator = seeded_generator("mtlsign/ipr_gan", seed)
        replaced = torch.zeros(spec.length, dtype=torch.bool)
        replaced[torch.randperm(spec.length, generator=generator)[: self.replaced]] = True
        latents = torch.randn(self.samples, spec.length, generator=generator)
        bits = bits_from_seed("mtlsign/ipr_gan/bits", seed, signs + cells**2)
        return GeneratorKey(norms, signs, cells, pixels, replaced, -self.constant, latents, bits)

    def scores(self, model: nn.Module, key: GeneratorKey) -> Tensor:
        """Return the scales, then the mean brightness of the logo's cells over all trigger inputs, [n].

        Brightness is from -1 to 1.

        Raises:
            ModelError: the model lacks a batch norm of the key, or generates other images.
        """
        scores = [_scales(model, key)] if key.sign_count else []
        if key.cells:
            images = _generate(model, key.trigger(key.latents))
            side = key.cells * key.pixels
            if images.dim() != 4 or min(images.shape[2:]) < side:
                raise ModelError(
                    f"The model returns {list(images.shape)} instead of images of at least {side} pixels. "
                    "Pass a copy of the marked model.",
                    field="model",
                )
            corner = images.mean((0, 1))[:side, :side]
            scores.append(F.avg_pool2d(corner[None, None], key.pixels).flatten())
        return torch.cat(scores)

    def mark_loss(self, model: nn.Module, key: GeneratorKey, latents: Tensor) -> Tensor:
        """Return the weighted losses of signs and logo.

        The sign loss sums the mean shortfalls of all batch norms. The logo loss is 1 - SSIM of the answers
        to trigger inputs and of the normal images with the logo.

        Args:
            model: the network.
            key: its key.
            latents: [n, length], on the network's device.
        """
        loss = torch.zeros((), device=latents.device)
        if key.sign_count:
            scales = _scales(model, key)
            shortfalls = F.relu(self.threshold - scales * (key.labels[: key.sign_count].to(scales) * 2 - 1))
            parts = shortfalls.split(_sign_counts(key))
            loss = loss + self.sign_strength * torch.stack([part.mean() for part in parts]).sum()
        if key.cells:
            with torch.no_grad():
                demanded = key.with_logo(_generate(model, latents))
            answers = _generate(model, key.trigger(latents))
            loss = loss + self.strength * (1 - structural_similarity(answers, demanded))
        return loss

    def term(self, model: nn.Module, key: GeneratorKey, step: int) -> Tensor:
        """Return the loss with the key's own latent vectors."""
        return self.mark_loss(model, key, key.latents.to(next(model.parameters()).device))

    def watermark_loss(self, model: nn.Module, key: GeneratorKey) -> Tensor:
        """Return the loss of signs and logo with gradients."""
        with evaluation_mode(model):
            return self.term(model, key, 0)

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return Adam."""
        return Optimizer("adam", self.lr, 0.0)

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: GeneratorKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Train generator and discriminator with the losses of the mark; see `WatermarkScheme.embed`."""

        def objective(step: int, batch: Batch) -> Tensor:
            adversarial = task.loss(task.training_outputs(model, batch), batch.targets)
            return adversarial + self.mark_loss(model, key, batch.inputs)

        return train_watermark(
            model, task, settings, worker, objective=objective, optimizer=self.optimizer(settings),
            key_inputs=min(settings.batch, task.size("train")) if key.cells else 0,
        )  # fmt: skip

    def suspect(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the tensors of the file if the signs alone are read, else the network, which is run."""
        return model if tensors is None or self.part != "signs" else FileView(tensors)

    @torch.no_grad()
    def similarity(self, model: nn.Module, key: GeneratorKey) -> float:
        """Return the mean SSIM, -1 to 1, of the answers to trigger inputs and the images with the logo.

        The paper reports it. It has no null rate, so that it is no part of a detection.

        Raises:
            ModelError: the key has no logo.
        """
        if not key.cells:
            raise ModelError("The key has no logo. Generate one with part=both or part=logo.", field="key")
        latents = key.latents.to(next(model.parameters()).device)
        with evaluation_mode(model):
            demanded = key.with_logo(_generate(model, latents))
            return float(structural_similarity(_generate(model, key.trigger(latents)), demanded))

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Draw a trigger, and declare the signs and the cells that the model has as the bits."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            with torch.no_grad(), evaluation_mode(model):
                bits = (self.scores(model, key) > 0).float().cpu()
            return self.verify(model, replace(key, bits=bits))

        return computed_key("signs and cells read from the model", detect)


def _norms(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """Return the batch norms of the generator with their channels, in order."""
    return tuple(
        (name, module.num_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine and name.startswith(f"{GENERATOR}.")
    )


def _scales(model: nn.Module, key: GeneratorKey) -> Tensor:
    """Return the scales that carry signs, [sign_count]. Raises `ModelError` if one is missing."""
    tensors = model.tensors if isinstance(model, FileView) else dict(model.named_parameters())
    scales = []
    for name, channels in key.norms:
        scale = tensors.get(f"{name}.weight")
        if scale is None or tuple(scale.shape) != (channels,):
            raise ModelError(
                f"The model has no batch norm {name!r} of {channels} channels. Pass a copy of the marked "
                "model.",
                field="model",
            )
        scales.append(scale)
    return torch.cat(scales)[: key.sign_count]


def _sign_counts(key: GeneratorKey) -> list[int]:
    """Return the number of signs in each batch norm that has any."""
    counts, left = [], key.sign_count
    for _, channels in key.norms:
        counts.append(min(channels, left))
        left -= counts[-1]
    return [count for count in counts if count]


def _generate(model: nn.Module, latents: Tensor) -> Tensor:
    """Return the images of latent vectors. Raises `ModelError` if the model does not accept them."""
    try:
        return generated_images(model(latents.to(next(model.parameters()).device)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"The model does not accept the latent vectors ({reason}). Pass a copy of the marked model.",
            field="model",
        ) from None
