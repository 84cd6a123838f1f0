"""What is kept of the unmarked W0: batch-norm affine, column norms, a sketch of its rows (design decision 5).

The reference is made after phase 1, before the key exists, and its digest is hashed into the key: whoever
wants another reference gets another key. A claim opens the reference; W0's kernels stay secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.taps import tapped_layers, tapped_parameters
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.opening import keystream
from mtlsign.watermark.verification.alignment import column_norms

MAX_REFERENCE_BYTES = 64 * 1024 * 1024
#: The sketch's matrix is public and the same for everyone: a keystream under this constant.
SKETCH_KEY = hashlib.sha256(b"mtlsign/v0/sketch").digest()


@dataclass(frozen=True)
class Reference:
    """W0's frame. `data` are the exact bytes (safetensors); their SHA-256 stands in the spec.

    Tensors, for each tapped convolution C that a batch norm follows: `C/gamma` |γ0| and `C/beta` float32 [O],
    `C/eps` float64 [1], `C/columns` float64 [groups, I/groups], `C/sketch` float16 [O, s]. Every other
    parameter of the tapped part with fewer than two dimensions (biases, layer norms) is kept whole as
    `=NAME`.
    """

    data: bytes
    tensors: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, hex."""
        return hashlib.sha256(self.data).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Parse an opened reference (at most 64 MiB). Raises `ArtifactError`."""
        if len(data) > MAX_REFERENCE_BYTES:
            raise ArtifactError(
                f"is over {MAX_REFERENCE_BYTES} bytes; a reference is small", field="reference"
            )
        try:
            tensors = parse_safetensors(data, max_bytes=MAX_REFERENCE_BYTES)
        except ModelError as error:
            raise ArtifactError(
                f"cannot be read ({error}); take the kit as it was written", field="reference"
            ) from None
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise ArtifactError(
                "holds numbers that are not finite; take the kit as it was written", field="reference"
            )
        return cls(data, tensors)


def make_reference(model: nn.Module, taps: Sequence[str], sample: Tensor) -> Reference:
    """Keep of `model` (W0, in any mode) what the verifier's graph needs.

    Args:
        model: the unmarked network.
        taps: module names.
        sample: float32 [1, C, H, W], any input of the carrier's geometry; only shapes matter.
    """
    layers = tapped_layers(model, taps, sample)
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    kept: dict[str, Tensor] = {}
    normed: set[str] = set()
    for layer in layers:
        if layer.bn is None:
            continue
        kernel, bn = parameters[layer.weight].detach(), modules[layer.bn]
        assert isinstance(bn, _BatchNorm)
        ones = torch.ones(kernel.shape[0])
        gamma = ones if bn.weight is None else bn.weight.detach().float().cpu()
        beta = torch.zeros_like(ones) if bn.bias is None else bn.bias.detach().float().cpu()
        groups = int(getattr(modules[layer.conv], "groups", 1))
        kernel = apply_bn_sign(kernel.cpu(), gamma)
        kept[f"{layer.conv}/gamma"] = gamma.abs().clone()
        kept[f"{layer.conv}/beta"] = beta.clone()
        kept[f"{layer.conv}/eps"] = torch.tensor([bn.eps], dtype=torch.float64)
        kept[f"{layer.conv}/columns"] = column_norms(kernel, groups)
        kept[f"{layer.conv}/sketch"] = random_projection(kernel)
        normed |= {f"{layer.bn}.weight", f"{layer.bn}.bias", f"{layer.conv}.bias"}
    for name in tapped_parameters(model, taps, sample):
        if name not in normed and name in parameters and parameters[name].dim() < 2:
            kept[f"={name}"] = parameters[name].detach().float().cpu().clone()
    data = serialize_safetensors(kept)
    return Reference(data, parse_safetensors(data))


def apply_bn_sign(kernel: Tensor, gamma: Tensor | None) -> Tensor:
    """Multiply sign(γ) onto the rows (+1 where γ is absent or 0): all that is read of a batch norm."""
    if gamma is None:
        return kernel
    sign = torch.where(gamma < 0, -1.0, 1.0).to(kernel.dtype)
    return kernel * sign.reshape(-1, *([1] * (kernel.dim() - 1)))


def random_projection(kernel: Tensor) -> Tensor:
    """Project a kernel's unit rows to s = max(1, min(32, fan_in // 4)) numbers by a public ±1 matrix over
    sqrt(s).

    Returns float16 [O, s]. The matrix [fan_in, s] is read row by row from the keystream
    `mtlsign/v0/sketch/<fan_in>/<s>` under SHA-256("mtlsign/v0/sketch"), a bit 1 being +1.
    """
    rows = kernel.detach().double().reshape(kernel.shape[0], -1)
    fan_in = rows.shape[1]
    size = max(1, min(32, fan_in // 4))
    stream = keystream(SKETCH_KEY, f"mtlsign/v0/sketch/{fan_in}/{size}".encode(), -(-fan_in * size // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: fan_in * size].astype(np.float64)
    matrix = torch.from_numpy(2 * bits - 1).reshape(fan_in, size)
    norms = rows.norm(dim=1, keepdim=True)
    projected: Tensor = (rows / torch.where(norms > 0, norms, torch.ones_like(norms))) @ matrix / size**0.5
    return projected.half()
