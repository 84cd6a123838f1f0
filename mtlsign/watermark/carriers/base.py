"""Protocol of carriers: data-space representations of the key's integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtlsign.models.input_spec import InputSpec
from mtlsign.watermark.keys.spec import CarrierSpec


class Carrier(Protocol):
    """Mapping from watermark integers to inputs of the primary network, as one spec defines it."""

    @classmethod
    def make(cls, n: int, input_spec: InputSpec) -> dict[str, int | str]:
        """Return the spec's `carrier` object for n integers.

        Args:
            n: key size.
            input_spec: inputs that the carrier must have.

        Raises:
            CarrierError: n or the inputs are outside the carrier's limits.
        """

    @classmethod
    def parse(cls, fields: Mapping[str, object] | CarrierSpec) -> Self:
        """Return the carrier of a spec's `carrier` object, which may be checked already.

        Raises:
            KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
        """

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """Return constant inputs of the carrier's shape and type, [count, *element_shape]."""

    def number_count(self, n: int) -> int:
        """Return how many numbers n inputs hold."""

    def check(self, n: int) -> None:
        """Raise CarrierError if n inputs need more memory than the carrier allows."""

    def inputs(self, integers: npt.NDArray[np.int64]) -> Tensor:
        """Return the inputs of n integers: [n, *element_shape], contiguous, on the CPU.

        Raises:
            CarrierError: an integer is outside the carrier's range, or `check` fails.
        """
