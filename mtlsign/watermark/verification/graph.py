"""The verifier's graph: the tapped part of an architecture with W0's affine and the suspect's kernels
(decision 5).

Embedding trains the mark in this graph and verification reads it there, so nothing that a thief may change
for free (batch-norm values, folding, scales, preprocessing, code) is ever looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.errors import ArtifactError
from mtlsign.models.taps import forward_to_taps, tapped_layers, tapped_parameters
from mtlsign.watermark.verification.alignment import canonicalize_kernels
from mtlsign.watermark.verification.reference import Reference, apply_bn_sign

#: A coordinate whose standard deviation over the key set is below this is read as 0 (decision 1).
MIN_STD = 1e-5


@dataclass(frozen=True)
class CanonicalConv:
    """A convolution brought into W0's frame: its kernel, the batch norm after it, W0's column norms."""

    weight: str
    bn: str
    groups: int
    columns: Tensor


class VerifierModel:
    """Runs the tapped part of `skeleton` on key images.

    Args:
        skeleton: the architecture, built from the spec's `graph`; its own values are never used. It is put
            into evaluation mode except for its batch norms, which use the statistics of the batch at hand.
        taps: module names.
        reference: W0's frame.
        sample: float32 [1, C, H, W] of the carrier's geometry.

    Raises:
        ModelError: a tap does not exist. ArtifactError: the reference does not fit the architecture.
    """

    def __init__(
        self, skeleton: nn.Module, taps: Sequence[str], reference: Reference, sample: Tensor
    ) -> None:
        self.taps = tuple(taps)
        self._net = skeleton.to(sample.device).eval()
        for module in skeleton.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        modules, parameters = dict(skeleton.named_modules()), dict(skeleton.named_parameters())
        self.framed: list[CanonicalConv] = []
        self._fixed: dict[str, Tensor] = {}
        used = tapped_parameters(skeleton, taps, sample)
        skipped: set[str] = set()
        for layer in tapped_layers(skeleton, taps, sample):
            if layer.bn is None:
                continue
            weight, bn = layer.weight, modules[layer.bn]
            groups, rows = int(getattr(modules[layer.conv], "groups", 1)), parameters[weight].shape[0]
            columns = self._kept(
                reference, f"{layer.conv}/columns", (groups, parameters[weight].shape[1]), sample.device
            )
            self.framed.append(CanonicalConv(weight, layer.bn, groups, columns.double()))
            for part, name in (("gamma", f"{layer.bn}.weight"), ("beta", f"{layer.bn}.bias")):
                value = self._kept(reference, f"{layer.conv}/{part}", (rows,), sample.device)
                if name in parameters:
                    self._fixed[name] = value.float()
            bn.eps = float(self._kept(reference, f"{layer.conv}/eps", (1,), torch.device("cpu")))
            if f"{layer.conv}.bias" in parameters:
                self._fixed[f"{layer.conv}.bias"] = torch.zeros(rows, device=sample.device)
            skipped |= {weight, f"{layer.bn}.weight", f"{layer.bn}.bias", f"{layer.conv}.bias"}
        plain = [name for name in used if name in parameters and name not in skipped]
        for name in plain:
            if parameters[name].dim() < 2:
                self._fixed[name] = self._kept(
                    reference, f"={name}", tuple(parameters[name].shape), sample.device
                ).float()
        self.plain_weights = [name for name in plain if parameters[name].dim() >= 2]
        #: what is read from a suspect: name -> shape (batch norms' γ only for its sign, and it may be absent)
        self.kernels = {f.weight: tuple(parameters[f.weight].shape) for f in self.framed}
        self.kernels |= {name: tuple(parameters[name].shape) for name in self.plain_weights}
        self.gammas = {f.weight: f"{f.bn}.weight" for f in self.framed}
        self._scratch = {
            f"{f.bn}.{name}": buffer.clone().to(sample.device)
            for f in self.framed
            for name, buffer in modules[f.bn].named_buffers()
        }

    @staticmethod
    def _kept(reference: Reference, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        tensor = reference.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            raise ArtifactError(
                f"does not fit the architecture at {name!r}; take the kit as it was written",
                field="reference",
            )
        return tensor.to(device)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The kernels of a network, float32, with sign(γ) on their rows; γ may be absent."""
        return {
            name: apply_bn_sign(tensors[name], tensors.get(self.gammas[name]))
            if name in self.gammas
            else tensors[name]
            for name in self.kernels
        }

    def into_frame(
        self, kernels: Mapping[str, Tensor], *, differentiable_rounds: int = 0
    ) -> dict[str, Tensor]:
        """W0's frame for every convolution that has one; other weights as they are."""
        out = dict(kernels)
        for f in self.framed:
            out[f.weight] = canonicalize_kernels(
                kernels[f.weight], f.columns, f.groups, differentiable_rounds=differentiable_rounds
            )
        return out

    def taps_of(self, framed: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
        """Tap outputs of the framed kernels on the whole key set as one batch: float32 [N, ...] each."""
        # Channels last: pooling, batch norm and convolutions of small kernels take two thirds of the time on
        # CPUs.
        fast = {n: k.to(memory_format=torch.channels_last) if k.dim() == 4 else k for n, k in framed.items()}
        values = {**fast, **self._fixed, **self._scratch}
        return forward_to_taps(
            self._net, images, self.taps, call=lambda x: functional_call(self._net, values, (x,))
        )

    def features(self, framed: Mapping[str, Tensor], images: Tensor, *, pooled: bool = False) -> Features:
        """Taps flattened (or averaged over space) and joined, with their statistics over the key set."""
        parts = [t.float() for t in self.taps_of(framed, images)]
        flat = [t.mean(tuple(range(2, t.dim()))) if pooled and t.dim() > 2 else t.flatten(1) for t in parts]
        return Features.of(torch.cat(flat, 1) if len(flat) > 1 else flat[0])


@dataclass(frozen=True)
class Features:
    """Standardised features = centred * inverse_std, kept apart because a linear head need not form the
    product.

    `centred` float32 [N, d]; `inverse_std` float32 [d], 0 where a coordinate is constant over the key set.
    """

    centred: Tensor
    inverse_std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Features:
        """Population statistics of the N rows of float32 [N, d]; dead ones pass no gradient to theirs."""
        centred, inverse_std = _Standardise.apply(features)
        return cls(centred, inverse_std)

    @property
    def standardised(self) -> Tensor:
        """float32 [N, d]."""
        return self.centred * self.inverse_std


class _Standardise(torch.autograd.Function):
    """Features [N, d] -> (centred, 1/std or 0) in few passes: `torch.var_mean` over rows is 20 times
    slower.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        centred = features - features.mean(0)
        centred -= centred.mean(
            0
        )  # what rounding left: a constant coordinate comes out as 0 whatever its size
        variance = (centred * centred).mean(0)
        dead = variance < MIN_STD**2
        inverse = torch.where(dead, torch.zeros_like(variance), torch.where(dead, 1.0, variance).rsqrt())
        ctx.save_for_backward(centred, inverse)
        return centred, inverse

    @staticmethod
    def backward(ctx: Any, centred_grad: Tensor, inverse_grad: Tensor) -> Tensor:
        centred, inverse = ctx.saved_tensors
        scale = inverse_grad * inverse**3 / -len(centred)
        return torch.addcmul(centred_grad - centred_grad.mean(0), centred, scale)


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Scores in fp32 without TF32 and without autocast (decision 1), whatever the caller had switched on."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
