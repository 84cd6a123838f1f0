"""Parts that black-box schemes share: key samples with chosen classes, trained along with primary batches."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes.base import Access, Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.comparator import Comparator, ComparatorKey, K
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import evaluation_mode, train_watermark
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.outputs import default_logits
from mtlsign.watermark.embedding.worker import WorkerContext

#: Samples from which the range of pixel values is measured.
_RANGE_SAMPLES = 500
#: Key samples that are classified at once.
_CHUNK = 500


@dataclass(frozen=True)
class TriggerKey(ComparatorKey):
    """Key samples and the classes that the marked model answers.

    `other_labels` are 0 for samples whose loss demands another class.

    Attributes:
        inputs: images, float32 [n, C, H, W], normalised as the task's.
        classes: int64 [n].
        rate: probability that an unmarked model answers the class of a key sample.
    """

    inputs: Tensor = field(repr=False)
    classes: Tensor = field(repr=False)
    rate: float = 0.1

    @property
    def own_labels(self) -> Tensor:
        """Bits, [n]: 1 for each key sample, which is to answer its class."""
        return torch.ones(len(self.classes))

    @property
    def sample_count(self) -> int:
        """Number of key samples."""
        return len(self.inputs)


@dataclass(frozen=True)
class TriggerMark(Comparator[K]):
    """Scheme that queries the model and compares classes.

    Attributes:
        key_size: key samples.
        in_batch: key samples that each training batch contains.
        lr: learning rate of SGD.
    """

    access: ClassVar[Access] = "black-box"

    key_size: int = 100
    in_batch: int = 16
    lr: float = 0.01

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> K:
        """Draw key samples and classes. Raises `ModelError` unless the task classifies images."""
        require_classified_images(task)
        return self.draw_key(model, task, seed)

    @abstractmethod
    def draw_key(self, model: nn.Module, task: Task, seed: int) -> K:
        """Draw key samples and classes for a task that classifies images."""

    def scores(self, model: nn.Module, key: K) -> Tensor:
        """Return how far the logit of each sample's class is above all others, [n]."""
        trigger = _as_trigger(key)
        logits = logits_of(model, trigger.inputs)
        classes = trigger.classes.to(logits.device)
        if int(classes.max()) >= logits.shape[1]:
            raise ModelError(
                f"The model has {logits.shape[1]} outputs and no class {int(classes.max())}. Pass a copy of "
                "the marked model.",
                field="model",
            )
        own = logits.gather(1, classes[:, None]).flatten()
        others = logits.scatter(1, classes[:, None], -torch.inf).max(1).values
        return own - others

    def null_rate(self, key: K) -> float:
        """Return the rate of the key."""
        return _as_trigger(key).rate

    def watermark_loss(self, model: nn.Module, key: K) -> Tensor | None:
        """Return the mean cross-entropy of the key samples, with another class where a label is 0."""
        trigger = _as_trigger(key)
        with evaluation_mode(model):
            logits = logits_of(model, trigger.inputs)
        demanded = torch.where(trigger.labels > 0, trigger.classes, (trigger.classes + 1) % logits.shape[1])
        return F.cross_entropy(logits, demanded.to(logits.device))

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: K,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Train on primary batches that contain key samples; see `WatermarkScheme.embed`."""
        count = min(self.in_batch, key.sample_count)

        def objective(step: int, batch: Batch) -> Tensor:
            inputs, classes = self.training_samples(key, step, count)
            x = torch.cat([batch.inputs, inputs.to(batch.inputs)])
            y = torch.cat([batch.targets, classes.to(batch.targets)])
            return task.loss(model(x), y)

        return train_watermark(
            model, task, settings, worker, objective=objective, optimizer=self.optimizer(settings),
            key_inputs=count,
        )  # fmt: skip

    def training_samples(self, key: K, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Return key samples and classes of a step; they take turns."""
        trigger = _as_trigger(key)
        rows = torch.arange(step * count, (step + 1) * count) % len(trigger.classes)
        return trigger.inputs[rows], trigger.classes[rows]


def _as_trigger(key: object) -> TriggerKey:
    assert isinstance(key, TriggerKey)
    return key


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits of images, with gradients: [n, classes].

    Raises:
        ModelError: the model does not accept the images.
    """
    device = next(model.parameters()).device
    try:
        return torch.cat([default_logits(model(part.to(device))) for part in inputs.split(_CHUNK)])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"The model does not accept the key samples ({reason}). Pass a copy of the marked model.",
            field="model",
        ) from None


def require_classified_images(task: Task) -> None:
    """Raise `ModelError` unless the task classifies images."""
    if not isinstance(task.input_spec, ImageSpec) or task.targets != "labels":
        raise ModelError("Key samples are images with classes. Use a task that classifies images.",
                         field="task")  # fmt: skip


def pixel_range(task: Task) -> tuple[float, float]:
    """Return the smallest and largest normalised pixel value of training images."""
    size = min(_RANGE_SAMPLES, task.size("train"))
    images = task.splits["train"].batch(torch.arange(size)).inputs
    return float(images.min()), float(images.max())


def training_images(
    task: Task,
    count: int,
    generator: torch.Generator,
    *,
    of_class: int | None = None,
    except_class: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return random training images and their classes, on the CPU.

    Args:
        task: the primary task.
        count: number of images, at most.
        generator: source of the choice.
        of_class: only images of this class; None for all.
        except_class: no images of this class; None for all.
    """
    split = task.splits["train"]
    rows = torch.randperm(task.size("train"), generator=generator)
    factor = 4 * task.classes if of_class is not None else 1 if except_class is None else 4
    inputs, classes = split.batch(rows[: factor * count])
    inputs, classes = inputs.cpu(), classes.cpu()
    is_chosen = torch.ones_like(classes, dtype=torch.bool)
    if of_class is not None:
        is_chosen &= classes == of_class
    if except_class is not None:
        is_chosen &= classes != except_class
    chosen = torch.nonzero(is_chosen).flatten()[:count]
    return inputs[chosen], classes[chosen]


def smooth_images(
    count: int, spec: ImageSpec, span: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Return abstract images: random coarse patterns, scaled up, [count, C, H, W] inside `span`."""
    coarse = torch.rand(count, spec.channels, 5, 5, generator=generator)
    images = F.interpolate(coarse, size=(spec.height, spec.width), mode="bicubic").clamp(0, 1)
    low, high = span
    return images * (high - low) + low


def adversarial_key(
    key: TriggerKey, model: nn.Module, span: tuple[float, float], *, steps: int = 50
) -> TriggerKey:
    """Change key samples until an unmarked model answers their classes.

    Args:
        key: key samples to start from.
        model: the model; unchanged.
        span: smallest and largest pixel value.
        steps: gradient steps at most.
    """
    device = next(model.parameters()).device
    images, classes = key.inputs.clone().to(device), key.classes.to(device)
    size = (span[1] - span[0]) / 50
    with evaluation_mode(model):
        for _ in range(steps):
            images.requires_grad_(True)
            logits = default_logits(model(images))
            if bool((logits.argmax(1) == classes).all()):
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, classes), images)
            images = (images.detach() - size * gradient.sign()).clamp(*span)
    return replace(key, inputs=images.detach().cpu())


def forge_by_gradient(scheme: TriggerMark[K], model: nn.Module, task: Task, seed: int) -> Forgery:
    """Make a false claim with adversarial key samples.

    Args:
        scheme: a scheme that accepts any key samples.
        model: an unmarked model; unchanged.
        task: its task.
        seed: seed of the key.
    """

    def detect() -> Detection:
        key = scheme.generate_key(model, task, seed)
        forged = adversarial_key(_as_trigger(key), model, pixel_range(task))
        return scheme.verify(model, forged)  # type: ignore[arg-type]  # K is a TriggerKey

    return computed_key("adversarial key samples", detect)
