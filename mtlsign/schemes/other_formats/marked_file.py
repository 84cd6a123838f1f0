"""Content of a file in which another program stored a marked model with its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.base import WatermarkScheme
from mtlsign.watermark.verification.evidence import MAX_N


@dataclass(frozen=True)
class MarkedFile:
    """Marked model with its key.

    Attributes:
        tensors: state dict of the model, on the CPU.
        scheme: scheme that verifies the key.
        key: key of that scheme: SECRET.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    scheme: WatermarkScheme[Any]
    key: Any = field(repr=False)

    def load_into(self, network: nn.Module) -> nn.Module:
        """Load the weights into a network of the other program's architecture, in place, and return it.

        Args:
            network: has the names and shapes of the file's tensors.

        Raises:
            ModelError: the names or shapes differ.
        """
        try:
            network.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"The network does not fit the file ({reason}). Use the architecture of the other program.",
                field="model",
            ) from None
        return network.eval()


def state_dict_of(value: object) -> dict[str, Tensor]:
    """Return a state dict without the prefix of `DataParallel`. Raises `ModelError` for anything else."""
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    ):
        raise ModelError("The file holds no state dict. Save it again.", field="file")
    prefix = "module." if all(name.startswith("module.") for name in value) else ""
    return {name.removeprefix(prefix): tensor.detach() for name, tensor in value.items()}


def checked_bits(value: Tensor) -> Tensor:
    """Return the bits of a message: float32 [n]. Raises `ModelError` for other numbers than 0 and 1."""
    bits = value.detach().flatten().float()
    if not 1 <= len(bits) <= MAX_N or not bool(((bits == 0) | (bits == 1)).all()):
        raise ModelError(
            f"The file's message is not one to {MAX_N:,} numbers 0 or 1. Save it again.", field="file"
        )
    return bits


def checked_matrix(value: object, rows: int, columns: int) -> Tensor:
    """Return a projection: float32 [rows, columns]. Raises `ModelError` for another shape or NaN."""
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape) != (rows, columns)
        or not bool(torch.isfinite(value).all())
    ):
        raise ModelError(
            f"The file's projection is no finite matrix of {rows:,} x {columns:,}. Save it again.",
            field="file",
        )
    return value.detach().float()


def kernel_of(tensors: Mapping[str, Tensor], name: str) -> tuple[str, Tensor]:
    """Return the layer and the weight of a parameter's name. Raises `ModelError` if there is none."""
    layer, _, leaf = name.rpartition(".")
    weight = tensors.get(name)
    if leaf != "weight" or weight is None or weight.dim() < 2:
        raise ModelError(f"The file has no kernel {name[:80]!r}. Save it again.", field="file")
    return layer, weight
