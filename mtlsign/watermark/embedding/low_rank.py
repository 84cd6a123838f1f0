"""Phase 2 in the factors of an adapter of low rank (LoRA): the base and other parameters stay unchanged.

The gradient of a matrix W = base + s·B·A gives those of its factors: s·Bᵀ·G for A and s·G·Aᵀ for B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.adapters import LowRankAdapter


class LowRankTraining:
    """Trained factors of an adapter, and the weights of the network that they determine.

    Args:
        adapter: the adapter whose product is part of W0.
    """

    def __init__(self, adapter: LowRankAdapter) -> None:
        self._adapter = adapter
        self._weights: dict[str, nn.Parameter] = {}
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._bases: dict[str, Tensor] = {}

    def attach(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Create the factors for a network that holds W0, and freeze its other parameters.

        Args:
            trained: parameters that phase 2 may change, by name.

        Returns:
            The matrices that have factors, by name.

        Raises:
            ModelError: phase 2 may not change a matrix of the adapter, such as an embedding, or shapes
                differ.
        """
        adapter = self._adapter
        missing = [name for name in adapter.factors if name not in trained]
        if missing:
            raise ModelError(
                f"The adapter changes {missing[0]!r}, which phase 2 must not change. "
                "Train an adapter of other layers.",
                field="adapter",
            )
        for name, parameter in trained.items():
            parameter.requires_grad_(name in adapter.factors)
        self._weights = {name: p for name, p in trained.items() if name in adapter.factors}
        for name, (down, up) in adapter.factors.items():
            weight = self._weights[name]
            if (len(up), down.shape[1]) != tuple(weight.shape):
                raise ModelError(f"The adapter's factors for {name!r} do not fit it.", field="adapter")
            a, b = (nn.Parameter(t.detach().to(weight.device, weight.dtype).clone()) for t in (down, up))
            self._factors[name] = (a, b)
            self._bases[name] = weight.detach().double() - self._product(name)
        return self._weights

    def factors(self, name: str) -> list[nn.Parameter]:
        """Return A and B of a matrix."""
        return list(self._factors[name])

    @property
    def digest(self) -> bytes:
        """Digest of the factors at the start, for the identity of checkpoints (32 bytes)."""
        files = self._adapter.files(self._adapter.factors)
        return hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in files)).digest()

    def set_gradients(self) -> None:
        """Set the gradients of the factors from those of the weights."""
        scale = self._adapter.scale
        with torch.no_grad():
            for name, (down, up) in self._factors.items():
                gradient = self._weights[name].grad
                assert gradient is not None
                down.grad = scale * (up.T @ gradient)
                up.grad = scale * (gradient @ down.T)

    def update_weights(self) -> None:
        """Write base + s·B·A into the weights, computed in float64."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._bases[name] + self._product(name))

    def state(self) -> dict[str, Tensor]:
        """Return the factors for a checkpoint, on the CPU."""
        return {
            f"{name}.{part}": factor.detach().cpu()
            for name, pair in self._factors.items()
            for part, factor in zip(("down", "up"), pair, strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the factors of a checkpoint."""
        with torch.no_grad():
            for name, pair in self._factors.items():
                for part, factor in zip(("down", "up"), pair, strict=True):
                    factor.copy_(state[f"{name}.{part}"])

    def files(self) -> dict[str, bytes]:
        """Return the files of the folder of the marked adapter, by name."""
        return self._adapter.files(self._factors)

    def _product(self, name: str) -> Tensor:
        """Return s·B·A in float64."""
        down, up = self._factors[name]
        return self._adapter.scale * (up.detach().double() @ down.detach().double())
