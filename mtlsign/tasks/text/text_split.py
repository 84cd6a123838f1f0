"""Splits of token ids in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mtlsign.tasks.batch import Batch


@dataclass(frozen=True)
class TextSplit:
    """Rows of token ids that several splits share.

    Every batch has the full length, so that a batch does not depend on its other samples.

    Attributes:
        tokens: int64 [N, L], padded with 0 after the last token.
        targets: int64 [N].
        rows: int64, the rows of this split.
    """

    tokens: Tensor
    targets: Tensor
    rows: Tensor

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> TextSplit:
        """Return the same split on `device`; self if it is there already."""
        if self.tokens.device == torch.device(device):
            return self
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, part: slice | None = None) -> Batch:
        """Return samples by index; see `Split.batch`. There is no augmentation."""
        rows = self.rows[indices[part] if part is not None else indices].to(self.tokens.device)
        return Batch(self.tokens[rows], self.targets[rows])
