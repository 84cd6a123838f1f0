"""Base class of the comparators: schemes of other authors behind the protocol of `mtlsign.schemes.base`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError, SettingsError
from mtlsign.schemes.base import Access, Detection, Forgery, SchemeKey, SchemeResult, SchemeSettings
from mtlsign.schemes.detection import DEFAULT_EVIDENCE_BITS, detection_of, unreadable
from mtlsign.schemes.training import Optimizer, evaluation_mode, train_watermark
from mtlsign.tasks import Batch, Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.embedding.worker import WorkerContext

K = TypeVar("K", bound=SchemeKey)


@dataclass(frozen=True)
class ComparatorKey(ABC):
    """Key of a comparator.

    Attributes:
        other_labels: float32 [n]: bits that replace those of the watermark in the loss; None for its own.
    """

    other_labels: Tensor | None = field(default=None, repr=False, kw_only=True)

    @property
    @abstractmethod
    def own_labels(self) -> Tensor:
        """Bits of the watermark, float32 [n]."""

    @property
    def labels(self) -> Tensor:
        """Bits that the loss demands, [n]."""
        return self.own_labels if self.other_labels is None else self.other_labels

    def with_labels(self, labels: Tensor) -> Self:
        """Return the same key with other bits."""
        return replace(self, other_labels=labels)


class BitsKey(ComparatorKey, ABC):
    """Key that holds the watermark.

    Attributes:
        bits: the watermark, float32 [n]; a field of the subclasses.
    """

    bits: Tensor

    @property
    def own_labels(self) -> Tensor:
        """Bits, [n]."""
        return self.bits


@dataclass(frozen=True)
class Comparator(ABC, Generic[K]):
    """Scheme whose bits are signs of scores, embedded by a loss next to the primary one.

    Attributes:
        min_evidence_bits: evidence from which a detection is accepted.
        key_size: bits or key samples.
        forging_tries: keys that `forge` tries where it can only try.
    """

    name: ClassVar[str]
    access: ClassVar[Access]
    needs_commitment: ClassVar[bool]
    default_steps: ClassVar[int] = 400

    min_evidence_bits: float = DEFAULT_EVIDENCE_BITS
    key_size: int = 256
    forging_tries: int = 100

    def with_key_options(self, **options: Any) -> Self:
        """Return the scheme with other options of `generate_key`; None stands for a default.

        Raises:
            SettingsError: the scheme has no such option.
        """
        known = {field.name for field in fields(self)}
        for name in options.keys() - known:
            raise SettingsError(f"The scheme {self.name!r} has no option {name!r}. Omit it.", field="scheme")
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def unsupported_reason(self, model: nn.Module, task: Task) -> str | None:
        """Return why the scheme cannot mark this model for this task; None if it can."""
        try:
            self.generate_key(model, task, 0)
        except ModelError as error:
            return error.detail
        return None

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Replace no layer."""

    @abstractmethod
    def generate_key(self, model: nn.Module, task: Task, seed: int) -> K:
        """Generate a key. Raises `ModelError` if the model or the task is not supported."""

    @abstractmethod
    def scores(self, model: nn.Module, key: K) -> Tensor:
        """Return one score for each bit, [n], with gradients; a positive score is a 1.

        Raises:
            ModelError: the model lacks what the key reads.
        """

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return the optimiser of an embedding."""
        return Optimizer()

    def extra_parameters(self, key: K) -> list[Tensor]:
        """Return parameters of the key that are trained with the model."""
        return []

    def term(self, model: nn.Module, key: K, step: int) -> Tensor:
        """Return the weighted watermark term of a step."""
        return self.bit_loss(self.scores(model, key), key.labels)

    def bit_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of scores and bits, [n] each: the mean binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores))

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: K,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Train on the primary loss and the watermark term; see `WatermarkScheme.embed`."""

        def objective(step: int, batch: Batch) -> Tensor:
            primary = task.loss(task.training_outputs(model, batch), batch.targets)
            return primary + self.term(model, key, step)

        return train_watermark(
            model, task, settings, worker, objective=objective, optimizer=self.optimizer(settings),
            extra=self.extra_parameters(key), key_inputs=key.sample_count,
        )  # fmt: skip

    @torch.no_grad()
    def verify(self, model: nn.Module, key: K, tensors: Mapping[str, Tensor] | None = None) -> Detection:
        """Count the bits that agree with the key; see `WatermarkScheme.verify`."""
        try:
            with evaluation_mode(model):
                scores = self.scores(self.suspect(model, tensors), key)
        except ModelError as error:
            return unreadable(len(key.labels), self.null_rate(key), error.detail)
        bits = key.labels.to(scores.device) > 0
        matched = int(((scores > 0) == bits).sum())
        return detection_of(matched, len(bits), self.null_rate(key), self.min_evidence_bits)

    def suspect(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the network that is read: the model itself, whatever the form of its file."""
        return model

    def null_rate(self, key: K) -> float:
        """Return the probability of one match with a random key."""
        return 0.5

    def watermark_loss(self, model: nn.Module, key: K) -> Tensor | None:
        """Return the loss of the key's bits with gradients."""
        with evaluation_mode(model):
            return self.bit_loss(self.scores(model, key), key.labels)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery | None:
        """Know no way."""
        return None


def bits_from_seed(domain: str, seed: int, count: int) -> Tensor:
    """Return keyed random bits: float32 [count] of 0 and 1."""
    return torch.randint(2, (count,), generator=seeded_generator(domain, seed)).float()
