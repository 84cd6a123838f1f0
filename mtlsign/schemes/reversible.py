"""Guan et al. 2020, "Reversible Watermarking in Deep Convolutional Neural Networks" (arXiv 2104.04268).

Two significant digits of the least important filters' weights form a sequence of integers. Histogram shifting
hides bits in it, and can be undone. The mark shows integrity, and any tuning destroys it by design.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.base import Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.comparator import bits_from_seed
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.training import unchanged_training
from mtlsign.schemes.weight_marks import WeightKey, WeightMark, weight_layers, weight_of
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import WorkerContext

#: Smallest and largest integer of the sequence.
_LOW, _HIGH = -99, 99


@dataclass(frozen=True)
class ReversibleKey(WeightKey):
    """Key of the histogram.

    Attributes:
        positions: positions of the host weights in the flat weight, int64, in order.
        scale: factor that turns a weight into its two-digit integer.
        peak: integer that carries bits: itself for a 0, its successor for a 1.
        zero: an integer above the peak that no host weight has.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)
    scale: float = 1.0
    peak: int = 0
    zero: int = 0


@dataclass(frozen=True)
class ReversibleScheme(WeightMark[ReversibleKey]):
    """Scheme of Guan et al.

    Attributes:
        host_share: share of a layer's filters, the least important ones, that holds the bits.
    """

    name: ClassVar[str] = "reversible"
    needs_commitment: ClassVar[bool] = True
    default_steps: ClassVar[int] = 1

    host_share: float = 0.5

    def unsupported_reason(self, model: nn.Module, task: Task) -> str | None:
        """Return why the scheme cannot mark this model; None if it can.

        The histograms depend on the trained network, so that `generate_key` alone checks them.
        """
        hosts = [weight.numel() * self.host_share for weight in weight_layers(model).values()]
        if max(hosts, default=0) >= self.key_size:
            return None
        return f"No layer has {self.key_size} weights that can hold bits. Choose a smaller key size."

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> ReversibleKey:
        """Find a layer whose histogram is high enough for all bits."""
        bits = bits_from_seed("mtlsign/reversible", seed, self.key_size)
        layers = weight_layers(model)
        for layer, weight in sorted(layers.items(), key=lambda item: -item[1].numel()):
            key = self._key_for(layer, weight.detach().cpu(), bits)
            if key is not None:
                return key
        raise ModelError(
            "No layer has a histogram that is high enough for all bits. Choose a smaller key size.",
            field="model",
        )

    def _key_for(self, layer: str, weight: Tensor, bits: Tensor) -> ReversibleKey | None:
        """Return the key of a layer, or None if its histogram is too small or has no empty bin."""
        rows = weight.flatten(1)
        count = max(1, round(self.host_share * len(rows)))
        importance = rows.double().norm(dim=1)
        filters = importance.argsort()[:count].sort().values
        positions = (filters[:, None] * rows.shape[1] + torch.arange(rows.shape[1])).flatten()
        values = weight.flatten()[positions]
        exponent = int(torch.floor(torch.log10(values.abs().double().clamp(min=1e-30))).median())
        scale = 10.0 ** (1 - exponent)
        # A weight takes part only if moving it up and down again restores its bits.
        step = 1 / scale
        restored = ((values.double() + step).float().double() - step).float()
        integers = _integers(values, scale)
        fits = (restored == values) & (integers > _LOW) & (integers < _HIGH)
        fits &= _integers((values.double() + step).float(), scale) == integers + 1
        positions, integers = positions[fits], integers[fits]
        if len(integers) == 0:
            return None
        histogram = torch.bincount(integers - _LOW, minlength=_HIGH - _LOW + 1)
        peak = int(histogram.argmax()) + _LOW
        if int(histogram.max()) < len(bits) or peak + 2 >= _HIGH:
            return None
        # Weights of the rarest integer above the peak do not take part, so that its bin is empty.
        zero = peak + 2 + int(histogram[peak + 2 - _LOW : _HIGH - _LOW].argmin())
        positions = positions[integers != zero]
        return ReversibleKey(layer, tuple(weight.shape), torch.empty(0), bits, positions, scale, peak, zero)

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: ReversibleKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Shift the bins between peak and empty bin, then write the bits; see `WatermarkScheme.embed`."""
        weight = weight_of(model, key.layer, key.shape)
        return unchanged_training(model, task, worker, lambda: _shift(weight, key, forwards=True))

    def restore(self, model: nn.Module, key: ReversibleKey) -> None:
        """Remove the mark from an unchanged marked model, in place: the base weights return exactly."""
        _shift(weight_of(model, key.layer, key.shape), key, forwards=False)

    def scores(self, model: nn.Module, key: ReversibleKey) -> Tensor:
        """Return 1 for bits that read 1 and -1 for the others, [n]; missing carriers read -1."""
        values = weight_of(model, key.layer, key.shape).detach().cpu().flatten()[key.positions]
        integers = _integers(values, key.scale)
        carriers = integers[(integers == key.peak) | (integers == key.peak + 1)]
        read = torch.full((len(key.bits),), -1.0)
        present = carriers[: len(read)]
        read[: len(present)] = torch.where(present == key.peak + 1, 1.0, -1.0)
        return read

    def watermark_loss(self, model: nn.Module, key: ReversibleKey) -> Tensor | None:
        """Return None: digits have no gradient."""
        return None

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Claim the bits that the model's digits show."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            shown = (self.scores(model, key) > 0).float()
            return self.verify(model, ReversibleKey(**{**key.__dict__, "bits": shown}))

        return computed_key("bits read from the model", detect)


def _integers(values: Tensor, scale: float) -> Tensor:
    """Return the two-digit integers of weights, int64."""
    return torch.round(values.double() * scale).clamp(-10_000, 10_000).long()


@torch.no_grad()
def _shift(weight: Tensor, key: ReversibleKey, *, forwards: bool) -> None:
    """Move the host weights by one unit of their second digit: up to embed, down to restore."""
    flat = weight.detach().cpu().flatten().clone()
    values = flat[key.positions]
    integers = _integers(values, key.scale)
    step = 1 / key.scale
    if forwards:
        moves = (integers > key.peak) & (integers < key.zero)
        carriers = torch.nonzero(integers == key.peak).flatten()[: len(key.bits)]
        moves[carriers] = key.bits.bool()
    else:
        carriers = torch.nonzero((integers == key.peak) | (integers == key.peak + 1)).flatten()
        moves = (integers > key.peak) & (integers <= key.zero)
        moves[carriers] = integers[carriers] == key.peak + 1
        step = -step
    flat[key.positions[moves]] = (values[moves].double() + step).float()
    weight.copy_(flat.reshape(weight.shape).to(weight))
