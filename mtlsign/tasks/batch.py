"""Batches of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of n samples; unpacks as `inputs, targets`.

    Attributes:
        inputs: float32 [n, C, H, W]. Other kinds of inputs are mappings or lists of tensors.
        targets: int64 [n] for classes. Other tasks use other tensors, mappings of tensors, or a list of n
            targets.
    """

    inputs: Any
    targets: Any

    def __len__(self) -> int:
        """Number of samples."""
        return _sample_count(self.inputs)

    def __iter__(self) -> Iterator[Any]:
        """Inputs, then targets."""
        yield self.inputs
        yield self.targets

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all its tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(tree_map_only(Tensor, move, self.inputs), tree_map_only(Tensor, move, self.targets))


def _sample_count(values: Any) -> int:
    return _sample_count(next(iter(values.values()))) if isinstance(values, Mapping) else len(values)
