"""c_WM, the classifier of the watermark task: derived from the key, or the paper's trained perceptron
(decision 4).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.opening import head_signs
from mtlsign.watermark.verification.graph import Features


class Head(Protocol):
    """Standardised features of d coordinates -> scores float32 [N]; a score above 0 reads as bit 1."""

    pooled: bool

    def __call__(self, features: Features) -> Tensor:
        """Scores float32 [N]."""

    def parameters(self) -> list[Tensor]:
        """What is trained."""

    def to_bytes(self) -> bytes | None:
        """What is stored in the kit."""


class KeyDerivedHead:
    """score = ⟨p, f⟩, p ∈ {±1}/√d from the key: nothing is trained, nothing stored, nothing to choose."""

    pooled = False

    def __init__(self, key: bytes, d: int, device: torch.device | str = "cpu") -> None:
        self._p = torch.from_numpy(head_signs(key, d)).to(device, torch.float32) / d**0.5

    def __call__(self, features: Features) -> Tensor:
        """Scores float32 [N]."""
        scores: Tensor = features.centred @ (self._p * features.inverse_std)
        return scores

    def parameters(self) -> list[Tensor]:
        """None."""
        return []

    def to_bytes(self) -> None:
        """A keyed head is never stored."""
        return


class TrainedHead:
    """The paper's two-layer perceptron (§4.1): it fits any model, so a claim needs an earlier commitment."""

    def __init__(
        self, d: int, hidden: int, *, pooled: bool, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pooled = pooled
        self._w1 = nn.Parameter(((torch.rand(hidden, d, generator=generator) * 2 - 1) / d**0.5).to(device))
        self._b1 = nn.Parameter(torch.zeros(hidden, device=device))
        self._w2 = nn.Parameter(((torch.rand(hidden, generator=generator) * 2 - 1) / hidden**0.5).to(device))
        self._b2 = nn.Parameter(torch.zeros((), device=device))

    def __call__(self, features: Features) -> Tensor:
        """Scores float32 [N]."""
        hidden = features.centred @ (self._w1 * features.inverse_std).T + self._b1
        return torch.relu(hidden) @ self._w2 + self._b2

    def parameters(self) -> list[Tensor]:
        """The four trained tensors."""
        return [self._w1, self._b1, self._w2, self._b2]

    def to_bytes(self) -> bytes:
        """safetensors: w1 [h, d], b1 [h], w2 [h], b2 []."""
        return serialize_safetensors(
            dict(zip(("w1", "b1", "w2", "b2"), (p.detach().cpu() for p in self.parameters()), strict=True))
        )

    @classmethod
    def from_bytes(
        cls, data: bytes, d: int, hidden: int, *, pooled: bool, device: torch.device | str = "cpu"
    ) -> TrainedHead:
        """Read an opened head. Raises `ArtifactError` where it does not fit the spec."""
        head, tensors = cls(d, hidden, pooled=pooled, device=device), parse_safetensors(data)
        for name, parameter in zip(("w1", "b1", "w2", "b2"), head.parameters(), strict=True):
            given = tensors.get(name)
            if given is None or given.shape != parameter.shape or not torch.isfinite(given).all():
                raise ArtifactError(
                    f"tensor {name!r} does not fit the spec; take the kit as it was written", field="head"
                )
            parameter.data.copy_(given)
        return head
