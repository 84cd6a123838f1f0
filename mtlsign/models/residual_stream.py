"""Residual stream of a transformer: its sources, and the matrices that read and write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlsign.models.attention_layers import (
    AttentionLayer,
    attention_layers,
    centres,
    preceding_norms,
)
from mtlsign.models.stream_stages import StagedParts, StreamStage, first_sources, inputs, staged_parts
from mtlsign.models.taps import TappedLayer, tapped_layers


@dataclass(frozen=True)
class ResidualStream:
    """Residual stream of a network with attention layers.

    With stages the other attributes are those of all of them together, and `size` is that of the first one.

    Attributes:
        size: numbers of one vector.
        attentions: attention layers in execution order.
        sources: names of the tensors whose vectors start the stream: token vectors, positions, patches.
        gains: name of a matrix -> name of the gain [in] of the norm before it.
        norms: key of a layer -> name of the norm before it.
        readers: names of the matrices that read the stream, [out, size].
        writers: names of the matrices whose output is added to it, [size, in].
        subtracts_mean: whether the norms subtract the mean of each vector.
        stages: stages of different sizes, in execution order; empty for a stream of one size.
    """

    size: int
    attentions: tuple[AttentionLayer, ...]
    sources: tuple[str, ...]
    gains: Mapping[str, str]
    norms: Mapping[str, str]
    readers: frozenset[str]
    writers: frozenset[str]
    subtracts_mean: bool
    stages: tuple[StreamStage, ...] = ()

    @property
    def parts(self) -> tuple[StreamStage, ...]:
        """Stages, or the whole stream as one."""
        only = StreamStage(self.size, self.attentions, self.sources, self.readers, self.writers)
        return self.stages or (only,)

    @property
    def mergings(self) -> tuple[str, ...]:
        """Names of the matrices between stages, whose columns are the vectors that start the next one."""
        return tuple(source for stage in self.stages[1:] for source in stage.sources)

    def size_of(self, layer: AttentionLayer) -> int:
        """Return the numbers of one vector at an attention layer."""
        return next((stage.size for stage in self.stages if layer in stage.attentions), self.size)

    @property
    def attention_weights(self) -> frozenset[str]:
        """Names of the matrices of all attention layers."""
        return frozenset(weight for layer in self.attentions for weight in layer.weights)

    def layers(self, tapped: Sequence[TappedLayer]) -> list[TappedLayer]:
        """Replace the matrices of attention layers by their products; leave out sources of the stream."""
        layers: list[TappedLayer] = []
        starts = {attention.query.weight: attention for attention in self.attentions}
        for layer in tapped:
            if layer.weight in starts:
                attention = starts[layer.weight]
                for name in (attention.query_key, attention.value_output):
                    layers.append(TappedLayer(attention.module, None, "attention", name))
            elif layer.weight not in self.attention_weights and layer.weight not in self.sources:
                layers.append(layer)
        return layers


def residual_stream(
    model: nn.Module, taps: Sequence[str], sample: Tensor, *, staged: bool = True
) -> ResidualStream | None:
    """Return the residual stream of a network; None for networks without attention layers.

    If the stream has several sizes but not the stages of `stream_stages`, attention layers of another input
    size than the first one are left out, and their matrices are read as those of linear layers.

    Args:
        model: the network, in any mode; its values have no influence.
        taps: module names.
        sample: one batch.
        staged: whether to look for stages. Verifiers read references that were made before there were
            stages without them.

    Raises:
        ModelError: a tap does not exist, or is not reached.
    """
    candidates = attention_layers(model, taps, sample)
    if not candidates:
        return None
    tapped = tapped_layers(model, taps, sample)
    parts = staged_parts(model, taps, sample, tapped, candidates) if staged else None
    if parts is not None:
        return _staged_stream(model, tapped, parts)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    size = parameters[candidates[0].query.weight].shape[1]
    attentions = tuple(
        layer
        for layer in candidates
        if parameters[layer.query.weight].shape[1] == size == parameters[layer.output].shape[0]
    )
    before = preceding_norms(model, taps, sample)
    inner = {weight for layer in attentions for weight in layer.weights}
    linear = [layer for layer in tapped if layer.kind == "linear" and layer.weight not in inner]
    reading = {weight: weight.rpartition(".")[0] for layer in attentions for weight in inputs(layer)}
    reading |= {
        layer.weight: layer.conv
        for layer in linear
        if layer.conv in before and parameters[layer.weight].shape[1] == size
    }
    writers = {layer.output for layer in attentions} | {
        layer.weight
        for layer in linear
        if layer.weight not in reading and parameters[layer.weight].shape[0] == size
    }
    norms = {owner: before[owner] for owner in reading.values() if owner in before}
    return ResidualStream(
        size=size,
        attentions=attentions,
        sources=tuple(first_sources(model, tapped, attentions[0], size)),
        gains={weight: f"{norms[owner]}.weight" for weight, owner in reading.items() if owner in norms},
        norms=_norms_by_key(attentions, linear, norms),
        readers=frozenset(reading),
        writers=frozenset(writers),
        subtracts_mean=any(centres(modules[norm]) for norm in norms.values()),
    )


def _staged_stream(model: nn.Module, tapped: Sequence[TappedLayer], parts: StagedParts) -> ResidualStream:
    """Return the stream of a network with stages."""
    stages, modules = parts.stages, dict(model.named_modules())
    attentions = tuple(layer for stage in stages for layer in stage.attentions)
    by_key = {layer.conv: parts.norms[layer.weight] for layer in tapped if layer.weight in parts.norms}
    for layer in attentions:
        norm = parts.norms[layer.query.weight]
        by_key |= {layer.query_key: norm, layer.value_output: norm}
    return ResidualStream(
        size=stages[0].size,
        attentions=attentions,
        sources=tuple(source for stage in stages for source in stage.sources),
        gains={weight: f"{norm}.weight" for weight, norm in parts.norms.items()},
        norms=by_key,
        readers=frozenset().union(*(stage.readers for stage in stages)),
        writers=frozenset().union(*(stage.writers for stage in stages)),
        subtracts_mean=any(centres(modules[norm]) for norm in parts.norms.values()),
        stages=stages,
    )


def _norms_by_key(
    attentions: Sequence[AttentionLayer], linear: Sequence[TappedLayer], norms: Mapping[str, str]
) -> dict[str, str]:
    """Return the norm before each layer that has one, by the key of the layer."""
    by_key = {layer.conv: norms[layer.conv] for layer in linear if layer.conv in norms}
    for layer in attentions:
        owner = layer.query.weight.rpartition(".")[0]
        if owner in norms:
            by_key |= {layer.query_key: norms[owner], layer.value_output: norms[owner]}
    return by_key


def source_vectors(tensor: Tensor, size: int) -> Tensor | None:
    """Return the vectors of a source, [r, size]; None if it has another size.

    The vectors of a convolution on patches are those that one pixel adds.

    Args:
        tensor: [..., size], or a kernel [size, C, h, w].
        size: numbers of one vector.
    """
    if tensor.dim() == 4 and tensor.shape[0] == size:
        return tensor.flatten(1).T
    if tensor.dim() >= 2 and tensor.shape[-1] == size:
        return tensor.reshape(-1, size)
    return None


def input_vectors(norm: nn.Module | None, inputs: Tensor) -> Tensor:
    """Return the vectors that a layer's matrix with the gain of its norm is multiplied with.

    Args:
        norm: the norm before the layer, or None.
        inputs: inputs of the norm, or of the layer without one, [..., size].
    """
    if norm is None:
        return inputs
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6
    centred = inputs - inputs.mean(-1, keepdim=True) if centres(norm) else inputs
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
