"""Read-outs: from a suspect's kernels to the N scores of one key (docs/decisions/0016).

Reading has two parts. `read` is independent of the key and costs most; a verifier shares its result among
claims on one suspect. `score` applies the head of the key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.watermark import carriers
from mtlsign.watermark.carriers.words import RESERVED_IDS
from mtlsign.watermark.keys.opening import keystream, watermark_integers, watermark_labels
from mtlsign.watermark.keys.spec import ReadoutSpec, Spec, WordCarrierSpec
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.heads import Head, KeyDerivedHead, SpreadHead, TrainedHead
from mtlsign.watermark.verification.model import VerifierModel, Weights
from mtlsign.watermark.verification.response_model import ResponseModel


class Readout(Protocol):
    """Mapping from kernels to scores; a score above 0 is read as bit 1.

    Attributes:
        spec: kind and number of bits.
        labels: the key's bits, uint8 [n].
        tolerates_missing: whether kernels may be missing; those that are contribute nothing.
        trained: tensors that embedding trains besides the network.
    """

    spec: ReadoutSpec
    labels: Tensor
    tolerates_missing: bool
    trained: list[Tensor]

    @property
    def model(self) -> VerifierModel | ResponseModel:
        """Everything that depends on architecture and reference alone."""

    def read(self, kernels: Weights, *, differentiable_rounds: int = 0) -> Any:
        """Compute all that is independent of the key.

        Args:
            kernels: result of `select_weights`, float32.
            differentiable_rounds: rounds of an iterative step that are differentiated; 0 for verification.
        """

    def score(self, reading: Any) -> Tensor:
        """Return scores [n] of the result of `read`."""

    def with_key(self, spec: Spec, key: bytes) -> Readout:
        """Return the read-out of another key with the same reference; not for trained heads."""

    def without_key_data(self) -> Readout:
        """Return a copy without the tensors that the key determines: all that `with_key` needs."""

    @property
    def key_bytes(self) -> int:
        """Bytes of the tensors that the key determines."""


class FeatureReadout:
    """Features of D_WM in the verifier model under a keyed or trained head (docs/decisions/0002).

    Args:
        model: the verifier model.
        spec: kind and number of bits.
        inputs: inputs of D_WM, float32 [n, C, H, W].
        labels: bits, uint8 [n].
        key: key of this read-out, 32 bytes.
        head: safetensors bytes of a trained head; None creates a fresh one.
    """

    tolerates_missing = False

    def __init__(
        self,
        model: VerifierModel,
        spec: ReadoutSpec,
        inputs: Tensor,
        labels: Tensor,
        key: bytes,
        head: bytes | None,
    ) -> None:
        self.model, self.spec, self.inputs, self.labels = model, spec, inputs, labels
        self.pooled = spec.head.kind == "free" and spec.head.features == "pooled"
        self.d = self._width()
        self.head = self._make_head(key, head)
        self.trained = self.head.parameters()

    def read(self, kernels: Weights, *, differentiable_rounds: int = 0) -> dict[str, Tensor]:
        """Return the kernels in canonical form; in binary64 for verification, so that machines agree."""
        canonical = self.model.canonicalize(kernels, differentiable_rounds=differentiable_rounds)
        if differentiable_rounds:
            return canonical
        return {name: kernel.double() for name, kernel in canonical.items()}

    def score(self, reading: Mapping[str, Tensor]) -> Tensor:
        """Return scores [n] on the key set as one batch, in the precision of the kernels."""
        return self.head(self.model.features(reading, self.inputs, pooled=self.pooled))

    def with_key(self, spec: Spec, key: bytes) -> FeatureReadout:
        """Return the read-out of another key; a trained head is kept."""
        other = copy.copy(self)
        inputs, labels = watermark_dataset(spec, key, self.spec.n)
        device = self.labels.device
        other.inputs, other.labels = inputs.to(device), labels.to(device)
        if self.spec.head.kind == "keyed":
            other.head = KeyDerivedHead(key, self.d, device)
        return other

    def without_key_data(self) -> FeatureReadout:
        """Return a copy without inputs and labels."""
        other = copy.copy(self)
        other.inputs, other.labels = self.inputs[:0], self.labels[:0]
        return other

    @property
    def key_bytes(self) -> int:
        """Bytes of the inputs of D_WM."""
        return self.inputs.numel() * self.inputs.element_size()

    def _make_head(self, key: bytes, data: bytes | None) -> Head:
        """Derive the keyed head, read an opened free head, or create a fresh free head."""
        head, device = self.spec.head, self.labels.device
        if head.kind == "keyed":
            return KeyDerivedHead(key, self.d, device)
        hidden = head.hidden or 1
        if data is not None:
            return TrainedHead.from_bytes(data, self.d, hidden, pooled=self.pooled, device=device)
        seed = int.from_bytes(keystream(key, b"mtlsign/v1/head-init", 7))
        return TrainedHead(self.d, hidden, pooled=self.pooled, seed=seed, device=device)

    def _width(self) -> int:
        """Return the number of features, measured on zero weights."""
        zeros = {
            name: torch.zeros(shape, device=self.labels.device)
            for name, shape in self.model.kernel_shapes.items()
        }
        with torch.no_grad():
            return self.model.features(zeros, self.inputs[:2], pooled=self.pooled).inverse_std.shape[0]


class SpreadReadout:
    """Responses of every marked layer, summed in N groups that the key chooses (docs/decisions/0016).

    Args:
        model: the response model.
        spec: kind and number of bits.
        labels: bits, uint8 [n].
        key: key of this read-out, 32 bytes.
    """

    tolerates_missing = True

    def __init__(self, model: ResponseModel, spec: ReadoutSpec, labels: Tensor, key: bytes) -> None:
        self.model, self.spec, self.labels = model, spec, labels
        self.head = SpreadHead(key, model.coordinates, spec.n, labels.device)
        self.trained: list[Tensor] = []

    def read(self, kernels: Weights, *, differentiable_rounds: int = 0) -> Tensor:
        """Return the coordinates of all marked layers, [D]."""
        return self.model.responses(kernels, differentiable_rounds=differentiable_rounds)

    def score(self, reading: Tensor) -> Tensor:
        """Return scores [n] in units of an unmarked network's standard deviation."""
        return self.head(reading)

    def with_key(self, spec: Spec, key: bytes) -> SpreadReadout:
        """Return the read-out of another key with the same reference."""
        labels = torch.from_numpy(watermark_labels(key, self.spec.n)).to(self.labels.device)
        return SpreadReadout(self.model, self.spec, labels, key)

    def without_key_data(self) -> SpreadReadout:
        """Return a copy without head and labels."""
        other = copy.copy(self)
        del other.head
        other.labels = self.labels[:0]
        return other

    @property
    def key_bytes(self) -> int:
        """Bytes of the head's permutation and signs."""
        return 9 * self.model.coordinates


def readout_key(key: bytes, index: int) -> bytes:
    """Return the key of read-out `index`: the key itself for the first, else a keystream under it."""
    return key if index == 0 else keystream(key, b"mtlsign/v1/readout/%d" % index, 32)


def require_known_words(spec: Spec, model: ConvVerifierModel) -> None:
    """Raise `ArtifactError` if the carrier has words without a vector in the reference."""
    carrier = spec.carrier
    if model.known_ids is None or not isinstance(carrier, WordCarrierSpec):
        return
    if carrier.base + RESERVED_IDS > model.known_ids:
        raise ArtifactError(
            f"The carrier has {carrier.base:,} words, and the reference vectors of {model.known_ids:,} ids. "
            "Use the reference of the same kit.",
            field="reference",
        )


def watermark_dataset(spec: Spec, key: bytes, n: int) -> tuple[Tensor, Tensor]:
    """Derive D_WM (paper §3.2) from the key alone: inputs float32 [N, C, H, W] and labels uint8 [N]."""
    inputs = carriers.for_spec(spec).inputs(watermark_integers(key, n))
    return inputs, torch.from_numpy(watermark_labels(key, n))
