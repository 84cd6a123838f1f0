"""Verifier model of networks that are run on key inputs (docs/decisions/0003, 0019).

Their convolutions, batch norms and recurrent layers are brought into W0's canonical form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.models.batch_norms import replace_frozen_batch_norms
from mtlsign.models.taps import (
    TappedLayer,
    forward_to_taps,
    tapped_buffers,
    tapped_layers,
    tapped_parameters,
)
from mtlsign.watermark.verification.bounded_convolutions import bound_convolutions
from mtlsign.watermark.verification.embedding_frame import EmbeddingFrame, embedding_frame
from mtlsign.watermark.verification.features import Features
from mtlsign.watermark.verification.model import CanonicalStep, Weights
from mtlsign.watermark.verification.reference import Reference, reference_tensor
from mtlsign.watermark.verification.scaling import apply_bn_sign, canonicalize_kernels


@dataclass(frozen=True)
class CanonicalConv:
    """Convolution that has a canonical form: its kernel, the batch norm after it, W0's column norms."""

    weight: str
    bn: str
    groups: int
    columns: Tensor


def apply_bn_signs(weights: Weights, bn_weights: Mapping[str, str]) -> dict[str, Tensor]:
    """Multiply the sign of each batch norm's γ onto the rows of its convolution, and remove γ.

    Args:
        weights: kernels, and those γ that the network has.
        bn_weights: name of a kernel -> name of the γ after it.
    """
    removed = set(bn_weights.values())
    return {
        name: apply_bn_sign(weight, weights.get(bn_weights[name])) if name in bn_weights else weight
        for name, weight in weights.items()
        if name not in removed
    }


def normalize_scales(
    weights: Weights, convs: Sequence[CanonicalConv], *, differentiable_rounds: int
) -> dict[str, Tensor]:
    """Scale rows and columns of every convolution in `convs` as `canonicalize_kernels` does.

    Args:
        weights: kernels, float32; those of other layers are returned unchanged.
        convs: convolutions with a canonical form.
        differentiable_rounds: see `canonicalize_kernels`.
    """
    normalized = dict(weights)
    for conv in convs:
        normalized[conv.weight] = canonicalize_kernels(
            weights[conv.weight], conv.columns, conv.groups, differentiable_rounds=differentiable_rounds
        )
    return normalized


class ConvVerifierModel:
    """Verifier model that runs an architecture with W0's batch-norm values and the suspect's kernels.

    Canonicalisation is an ordered list of steps. The sign of γ is applied when kernels are selected, because
    that step needs γ; training perturbs the kernels after it. `canonical_steps` need the kernels alone.

    In a network with recurrent layers after an embedding, W0's word vectors replace the suspect's, and the
    suspect's matrices are read in W0's coordinates (`EmbeddingFrame`).

    Args:
        template_model: the network of the spec's `architecture`; its own values are never used. It is put
            into evaluation mode except for its batch norms, which use the statistics of the batch.
        taps: module names.
        reference: W0's reference.
        sample: float32 [1, C, H, W] of the carrier's geometry, or int64 [1, L] token ids.

    Attributes:
        known_ids: number of token ids with a vector of W0; None if the suspect's vectors are read.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """

    def __init__(
        self, template_model: nn.Module, taps: Sequence[str], reference: Reference, sample: Tensor
    ) -> None:
        self.taps = tuple(taps)
        replace_frozen_batch_norms(template_model)
        bound_convolutions(template_model)
        self._net = template_model.to(sample.device).eval()
        for module in template_model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        self._device = sample.device
        self._reference_values: dict[str, Tensor] = {}
        self.normalized_convs: list[CanonicalConv] = []
        parameters = dict(template_model.named_parameters())
        used = tapped_parameters(template_model, taps, sample)
        layers = [
            layer for layer in tapped_layers(template_model, taps, sample) if layer.batch_norm is not None
        ]
        covered = set().union(*(self._add_conv(layer, parameters, reference) for layer in layers))
        others = [name for name in used if name in parameters and name not in covered]
        for name in others:
            if parameters[name].dim() < 2:
                shape = tuple(parameters[name].shape)
                self._reference_values[name] = self._reference_tensor(reference, f"={name}", shape).float()
        self._frame = self._read_frame(template_model, reference, sample)
        self.other_weights = [
            name for name in others if parameters[name].dim() >= 2 and name not in self._reference_values
        ]
        names = [*(conv.weight for conv in self.normalized_convs), *self.other_weights]
        self.kernel_shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameters[name].shape) for name in names
        }
        embedding = {} if self._frame is None else {self._frame.weight: self._frame.shape}
        self.weight_shapes: Mapping[str, tuple[int, ...]] = {**self.kernel_shapes, **embedding}
        self._bn_weights = {conv.weight: f"{conv.bn}.weight" for conv in self.normalized_convs}
        self.optional_shapes: Mapping[str, tuple[int, ...]] = {
            bn_weight: (self.kernel_shapes[weight][0],) for weight, bn_weight in self._bn_weights.items()
        }
        self.canonical_steps: tuple[CanonicalStep, ...] = (
            partial(normalize_scales, convs=self.normalized_convs),
        )
        self._buffers = self._batch_norm_buffers() | self._reference_buffers(taps, reference, sample)

    def _add_conv(
        self, layer: TappedLayer, parameters: Mapping[str, Tensor], reference: Reference
    ) -> set[str]:
        """Read one convolution's values from the reference; return the parameters that these replace."""
        assert layer.batch_norm is not None
        modules = dict(self._net.named_modules())
        groups = int(getattr(modules[layer.conv], "groups", 1))
        rows, inputs = parameters[layer.weight].shape[:2]
        columns = self._reference_tensor(reference, f"{layer.conv}/columns", (groups, inputs))
        self.normalized_convs.append(CanonicalConv(layer.weight, layer.batch_norm, groups, columns.double()))
        bn_weight, bn_bias, conv_bias = (
            f"{layer.batch_norm}.weight",
            f"{layer.batch_norm}.bias",
            f"{layer.conv}.bias",
        )
        for part, name in (("gamma", bn_weight), ("beta", bn_bias)):
            value = self._reference_tensor(reference, f"{layer.conv}/{part}", (rows,))
            if name in parameters:
                self._reference_values[name] = value.float()
        modules[layer.batch_norm].eps = float(self._reference_tensor(reference, f"{layer.conv}/eps", (1,)))
        if conv_bias in parameters:
            self._reference_values[conv_bias] = torch.zeros(rows, device=self._device)
        return {layer.weight, bn_weight, bn_bias, conv_bias}

    def _read_frame(
        self, template_model: nn.Module, reference: Reference, sample: Tensor
    ) -> EmbeddingFrame | None:
        """Return the frame of the word vectors, and take these from the reference; None without any."""
        self.known_ids: int | None = None
        if sample.is_floating_point():  # images have no embedding
            return None
        frame = embedding_frame(template_model, self.taps, sample, reference.tensors)
        if frame is None or not frame.readers:
            return None
        rows = reference.tensors[f"{frame.weight.removesuffix('.weight')}/rows"]
        self._reference_values[frame.weight] = rows.float().to(self._device)
        self.known_ids = len(rows)
        return frame

    def _reference_tensor(self, reference: Reference, name: str, shape: tuple[int, ...]) -> Tensor:
        return reference_tensor(reference, name, shape).to(self._device)

    def _batch_norm_buffers(self) -> dict[str, Tensor]:
        """Copy the batch norms' buffers, so that runs update the copies and not the template model."""
        modules = dict(self._net.named_modules())
        return {
            f"{conv.bn}.{name}": buffer.clone().to(self._device)
            for conv in self.normalized_convs
            for name, buffer in modules[conv.bn].named_buffers()
        }

    def _reference_buffers(
        self, taps: Sequence[str], reference: Reference, sample: Tensor
    ) -> dict[str, Tensor]:
        """Read the other buffers of the tapped part, such as the mean of the inputs, from the reference."""
        state = self._net.state_dict()
        return {
            name: self._reference_tensor(reference, f"={name}", tuple(state[name].shape))
            for name in tapped_buffers(self._net, taps, sample)
            if name in state
        }

    @cached_property
    def byte_count(self) -> int:
        """Bytes of the tensors that the model keeps, the template's included."""
        tensors = [*self._net.parameters(), *self._net.buffers(), *self._buffers.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def select_weights(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the network's kernels with sign(γ) on their rows; γ may be absent.

        Matrices that read word vectors are returned in the coordinates of W0's, and without the embedding.
        """
        names = (*self.weight_shapes, *(name for name in self.optional_shapes if name in tensors))
        kernels = {name: tensors[name] for name in names}
        if self._frame is not None:
            kernels = self._frame.apply(kernels)
        return apply_bn_signs(kernels, self._bn_weights)

    def canonicalize(self, kernels: Weights, *, differentiable_rounds: int = 0) -> dict[str, Tensor]:
        """Bring every convolution that a batch norm follows into canonical form; keep other weights.

        Args:
            kernels: result of `select_weights`, float32.
            differentiable_rounds: see `canonicalize_kernels`; 0 for verification.

        Returns:
            Float32 tensors of the same names and shapes.
        """
        canonical = dict(kernels)
        for step in self.canonical_steps:
            canonical = step(canonical, differentiable_rounds=differentiable_rounds)
        return canonical

    def tap_outputs(self, canonical: Weights, inputs: Tensor) -> list[Tensor]:
        """Return the outputs of all taps on the whole key set as one batch: [N, ...] each.

        They have the precision of the kernels: binary64 for verification, so that machines agree.
        """
        dtype = next(iter(canonical.values())).dtype
        # Channels last, because pooling, batch norm and convolutions of small kernels then take two thirds of
        # the time on CPUs.
        weights = {
            name: kernel.to(memory_format=torch.channels_last) if kernel.dim() == 4 else kernel
            for name, kernel in canonical.items()
        }
        values = {**weights, **self._reference_values, **self._buffers}
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        if dtype != torch.float32:
            values = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in values.items()
            }
        return forward_to_taps(
            self._net, inputs, self.taps, call=lambda x: functional_call(self._net, values, (x,))
        )

    def features(self, canonical: Weights, inputs: Tensor, *, pooled: bool = False) -> Features:
        """Return the joined tap outputs with their statistics over the key set.

        Args:
            canonical: result of `canonicalize`, in the precision of the computation.
            inputs: the key set as one batch, float32 [N, C, H, W].
            pooled: average each tap over its spatial positions instead of flattening it.
        """
        outputs = self.tap_outputs(canonical, inputs)
        flat = [
            output.mean(tuple(range(2, output.dim()))) if pooled and output.dim() > 2 else output.flatten(1)
            for output in outputs
        ]
        return Features.from_taps(torch.cat(flat, 1) if len(flat) > 1 else flat[0])
