"""Heads: c_WM, the classifier of the watermark task, keyed or trained (docs/decisions/0002)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.opening import head_signs, spread_order
from mtlsign.watermark.verification.features import Features


class Head(Protocol):
    """Mapping from standardised features of d coordinates to scores; a score above 0 is read as bit 1."""

    pooled: bool

    def __call__(self, features: Features) -> Tensor:
        """Return scores [N] in the features' precision."""

    def parameters(self) -> list[Tensor]:
        """Return the trained tensors."""

    def to_bytes(self) -> bytes | None:
        """Return the bytes that the kit stores, or None."""


class KeyDerivedHead:
    """Linear head from the key alone: score = ⟨p, f⟩ with p ∈ {±1}/√d. It is neither trained nor stored."""

    pooled = False

    def __init__(self, key: bytes, d: int, device: torch.device | str = "cpu") -> None:
        self._projection = torch.from_numpy(head_signs(key, d)).to(device, torch.float32) / d**0.5

    def __call__(self, features: Features) -> Tensor:
        """Return scores [N] in the features' precision."""
        scores: Tensor = features.centred @ (self._projection.to(features.centred) * features.inverse_std)
        return scores

    def parameters(self) -> list[Tensor]:
        """Return no tensors: this head is not trained."""
        return []

    def to_bytes(self) -> None:
        """Return None: this head is not stored."""
        return


class SpreadHead:
    """Keyed groups of response coordinates: score_b = Σ ±z over group b, divided by the root of its size.

    The key permutes the D coordinates and gives each a sign; group b holds the ⌊D/N⌋ coordinates from
    position b·⌊D/N⌋ on. It is neither trained nor stored.

    Args:
        key: 32 bytes.
        d: number of coordinates.
        n: number of groups, at most d.
        device: where scores are computed.

    Raises:
        ArtifactError: there are fewer coordinates than groups.
    """

    def __init__(self, key: bytes, d: int, n: int, device: torch.device | str = "cpu") -> None:
        if d < n:
            raise ArtifactError(
                f"The marked layers have {d:,} coordinates, fewer than the {n:,} bits. "
                "Mark more layers, or choose a smaller --key-size.",
                field="key_size",
            )
        self._shape = n, d // n
        used = n * (d // n)
        self._order = torch.from_numpy(spread_order(key, d)[:used].copy()).to(device)
        self._signs = torch.from_numpy(head_signs(key, d)[:used].copy()).to(device)

    def __call__(self, responses: Tensor) -> Tensor:
        """Return scores [N] of coordinates [D], in their precision."""
        signed = responses[self._order] * self._signs.to(responses.dtype)
        scores: Tensor = signed.reshape(self._shape).sum(1) / self._shape[1] ** 0.5
        return scores


class TrainedHead:
    """Two-layer perceptron (paper §4.1). It fits any model, so a claim needs an earlier commitment."""

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
        """Return scores [N] in the features' precision."""
        w1, b1, w2, b2 = (parameter.to(features.centred) for parameter in self.parameters())
        hidden = features.centred @ (w1 * features.inverse_std).T + b1
        return torch.relu(hidden) @ w2 + b2

    def parameters(self) -> list[Tensor]:
        """Return the four trained tensors."""
        return [self._w1, self._b1, self._w2, self._b2]

    def to_bytes(self) -> bytes:
        """Return safetensors bytes: w1 [h, d], b1 [h], w2 [h], b2 []."""
        return serialize_safetensors(
            dict(zip(("w1", "b1", "w2", "b2"), (p.detach().cpu() for p in self.parameters()), strict=True))
        )

    @classmethod
    def from_bytes(
        cls, data: bytes, d: int, hidden: int, *, pooled: bool, device: torch.device | str = "cpu"
    ) -> TrainedHead:
        """Read an opened head.

        Args:
            data: safetensors bytes.
            d: number of features.
            hidden: hidden units.
            pooled: whether the features are averaged over space.
            device: where the tensors are placed.

        Raises:
            ArtifactError: the head does not fit the spec.
        """
        tensors = parse_safetensors(data, max_tensors=4)
        shapes = {"w1": (hidden, d), "b1": (hidden,), "w2": (hidden,), "b2": ()}
        for name, shape in shapes.items():  # before anything of that size is allocated
            tensor = tensors.get(name)
            if (
                tensor is None
                or tuple(tensor.shape) != shape
                or tensor.dtype != torch.float32
                or not torch.isfinite(tensor).all()
            ):
                raise ArtifactError(
                    f"Tensor {name!r} does not fit the spec. Use the head of the same kit, unmodified.",
                    field="head",
                )
        head = cls(d, hidden, pooled=pooled, device=device)
        for name, parameter in zip(shapes, head.parameters(), strict=True):
            parameter.data.copy_(tensors[name])
        return head
