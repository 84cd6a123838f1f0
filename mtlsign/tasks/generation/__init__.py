"""Generation of images: random vectors in, images out, with the data of a task of square images.

Names are "gan-" and the name of the task. Inputs are latent vectors, and targets are real images from -1 to
1, which are paired with them at random. Digits have 8x8 pixels, the size of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import DataError
from mtlsign.models.dcgan import LATENT
from mtlsign.models.input_spec import ImageSpec, LatentSpec
from mtlsign.tasks.base import Split, Task
from mtlsign.tasks.batch import Batch
from mtlsign.tasks.generation.metric import FrechetQuality
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.tasks.tensor_split import InputTransform, TensorSplit

PREFIX = "gan-"
#: Tasks whose images can be generated, and the factor by which their sides are divided.
SOURCES = {"digits": 4, "mnist": 1, "fashion-mnist": 1, "cifar10": 1, "cifar100": 1}
NAMES = tuple(PREFIX + name for name in SOURCES)
#: Pixel values from -1 to 1, without augmentation.
_RANGE = InputTransform((0.5,), (0.5,))


@dataclass(frozen=True)
class LatentSplit:
    """Latent vectors with the images of a split as targets.

    Attributes:
        images: the images.
        latents: float32 [rows, LATENT], fixed vectors for batches without augmentation.
        factor: side of the squares of pixels that are averaged.
    """

    images: Split
    latents: Tensor
    factor: int = 1

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.images)

    def to(self, device: torch.device | str) -> LatentSplit:
        """Return the same split with batches on `device`."""
        return replace(self, images=self.images.to(device), latents=self.latents.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; `augment` draws new vectors. See `Split.batch`."""
        part = part or slice(0, len(indices))
        images = F.avg_pool2d(self.images.batch(indices, None, part).inputs, self.factor)
        if augment is None:
            vectors = self.latents[indices.to(self.latents.device)][part]
        else:
            vectors = torch.randn(len(indices), LATENT, generator=augment)[part]
        return Batch(vectors.to(images), images)


def generation_task(source: Task, *, name: str, factor: int = 1) -> Task:
    """Return the task of generating the images of a task.

    Args:
        source: a task of square images in memory.
        name: name of the new task.
        factor: factor by which the sides of the images are divided.

    Raises:
        DataError: the source has no such images.
    """
    spec = source.input_spec
    if not isinstance(spec, ImageSpec) or spec.height != spec.width:
        raise DataError(f"{source.name!r} has no square images. Use another task.", field="task")
    splits: dict[str, Split] = {}
    for split_name, split in source.splits.items():
        if not isinstance(split, TensorSplit):
            raise DataError(f"The images of {source.name!r} are not in memory.", field="task")
        generator = seeded_generator("mtlsign/generation", split_name)
        latents = torch.randn(len(split), LATENT, generator=generator)
        splits[split_name] = LatentSplit(replace(split, transform=_RANGE), latents, factor)
    return Task(
        name,
        LatentSpec(LATENT, spec.channels, spec.height // factor, spec.width // factor),
        splits,
        loss=adversarial_loss,
        metric=partial(FrechetQuality, channels=spec.channels),
        logits_of=generated_images,
        training_outputs=_training_outputs,
        targets="values",
    )


def load_generation(name: str, load: Callable[[str], Task]) -> Task:
    """Load a task of this package.

    Args:
        name: such as "gan-digits" or "gan-mnist@0.1".
        load: loads the task of the images by its name.
    """
    source = name.removeprefix(PREFIX)
    return generation_task(load(source), name=name, factor=SOURCES[source.partition("@")[0]])


def generated_images(outputs: Any) -> Tensor:
    """Return the images of a generator's outputs, [n, C, H, W]."""
    images: Tensor = outputs["images"] if isinstance(outputs, Mapping) else outputs
    return images


def adversarial_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Return the losses of discriminator and generator, in their non-saturating form, as one sum.

    Each of the two terms has gradients for one of the networks alone (see `DCGAN.forward`), so that one
    step of an optimiser trains both (Goodfellow et al. 2014, arXiv 1406.2661).

    Args:
        outputs: training outputs of the network.
        targets: real images, which these outputs contain already.

    Raises:
        DataError: the outputs are images alone.
    """
    if not isinstance(outputs, Mapping):
        raise DataError(
            "The loss of a generator needs the discriminator's answers. Use Task.training_outputs.",
            field="task",
        )
    discriminator = F.softplus(-outputs["real"]).mean() + F.softplus(outputs["generated"]).mean()
    loss: Tensor = discriminator + F.softplus(-outputs["convinced"]).mean()
    return loss


def _training_outputs(network: nn.Module, batch: Batch) -> Any:
    return network(batch.inputs, batch.targets)
