"""Protocol of verifier models: the tapped part of an architecture, run on weights in canonical form.

Embedding trains the watermark in this model and verification reads it there. The verifier therefore ignores
everything an attacker can change without affecting accuracy: BatchNorm values, folding, scales, preprocessing
and code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mtlsign.watermark.verification.features import Features

#: Weights by name: raw tensors of a network, its selected kernels, or kernels in canonical form.
Weights = Mapping[str, Tensor]


#: Operators whose precision a caller can reduce, from general to single ones. `torch.backends.mkldnn` is
#: absent: its setter writes the general precision (torch 2.15), and its three operators are all here.
_PRECISIONS: tuple[Any, ...] = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # missing in the annotations
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]  # missing in the annotations
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # as above
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]  # as above
)


class CanonicalStep(Protocol):
    """One step of canonicalisation: a pure function from weights to weights."""

    def __call__(self, weights: Weights, *, differentiable_rounds: int) -> dict[str, Tensor]:
        """Return new weights; see `VerifierModel.canonicalize` for the arguments."""


class VerifierModel(Protocol):
    """Tapped part of one architecture, independent of the suspect's own code and values.

    Attributes:
        taps: module names.
        weight_shapes: name -> shape of every tensor read from a network.
        kernel_shapes: name -> shape of every kernel that `select_weights` makes of them.
        optional_shapes: name -> shape of tensors that are read if the network has them.
    """

    taps: tuple[str, ...]
    kernel_shapes: Mapping[str, tuple[int, ...]]
    weight_shapes: Mapping[str, tuple[int, ...]]
    optional_shapes: Mapping[str, tuple[int, ...]]

    @property
    def byte_count(self) -> int:
        """Bytes of the tensors that the model keeps."""

    def select_weights(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the kernels that `weight_shapes` names, with every correction that needs other tensors."""

    def canonicalize(self, kernels: Weights, *, differentiable_rounds: int = 0) -> dict[str, Tensor]:
        """Bring kernels into the canonical form of W0.

        Args:
            kernels: result of `select_weights`, float32.
            differentiable_rounds: rounds of an iterative step that are differentiated; 0 for verification.

        Returns:
            Float32 tensors of the same names and shapes.
        """

    def tap_outputs(self, canonical: Weights, inputs: Tensor) -> list[Tensor]:
        """Return the outputs of all taps on the whole key set as one batch: [N, ...] each."""

    def features(self, canonical: Weights, inputs: Tensor, *, pooled: bool = False) -> Features:
        """Return the joined tap outputs with their statistics over the key set.

        Args:
            canonical: result of `canonicalize`, in the precision of the computation.
            inputs: the key set as one batch, float32 [N, ...].
            pooled: average each tap over its spatial positions instead of flattening it.
        """


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 values in another type; those that are too large for it become its largest.

    A suspect's numbers have any size, and infinite ones cannot be compared.
    """
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


class _PrecisionGuard:
    """Holds all operators at exact fp32 while at least one thread computes.

    The settings are global to the process. Contexts of several threads can therefore overlap in any order:
    the first one stores the caller's settings and the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active_contexts = 0
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if self._active_contexts == 0:
                self._before = [operator.fp32_precision for operator in _PRECISIONS]
                for operator in _PRECISIONS:
                    operator.fp32_precision = "ieee"
            self._active_contexts += 1

    def exit(self) -> None:
        with self._lock:
            self._active_contexts -= 1
            if self._active_contexts == 0:
                self._restore()

    def _restore(self) -> None:
        for operator, precision in zip(_PRECISIONS, self._before, strict=True):
            operator.fp32_precision = "none"  # a single operator then has the value of the general one
            if operator.fp32_precision != precision:
                operator.fp32_precision = precision


_guard = _PrecisionGuard()


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute in fp32 without TF32, bfloat16 and autocast, so that machines agree (docs/decisions/0001).

    The settings of the caller are restored, also those of single operators and when threads overlap.
    """
    _guard.enter()
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _guard.exit()
