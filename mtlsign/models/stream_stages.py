"""Stages of a residual stream whose width changes, as in networks with windowed attention.

Between two stages a linear layer reads the vectors of several neighbouring positions at once, after one norm
over all of them, and its outputs start the stream of the next stage (patch merging, Liu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor, nn

from mtlsign.models.attention_layers import AttentionLayer, is_row_norm
from mtlsign.models.norm_flow import norms_before_matrices
from mtlsign.models.taps import TappedLayer, tapped_parameters


@dataclass(frozen=True)
class StreamStage:
    """Part of a residual stream with vectors of one size.

    Attributes:
        size: numbers of one vector.
        attentions: attention layers in execution order.
        sources: names of the tensors whose vectors start the stage. Those of a patch merging are the columns
            of its matrix [size, in].
        readers: names of the matrices that read the stream, [out, m * size]; m is above 1 for a matrix that
            reads the vectors of m positions, one after the other.
        writers: names of the matrices whose output is added to it, [size, in].
        first_norm: name of the norm through which the sources start the stream. Its gains and offsets belong
            to numbers of the stream, so that only permutations of them and one common sign are free.
    """

    size: int
    attentions: tuple[AttentionLayer, ...]
    sources: tuple[str, ...]
    readers: frozenset[str]
    writers: frozenset[str]
    first_norm: str | None = None


@dataclass(frozen=True)
class StagedParts:
    """Stages of a network, and the norms of their readers.

    Attributes:
        stages: in execution order, at least two.
        norms: name of a matrix -> name of the norm before it.
    """

    stages: tuple[StreamStage, ...]
    norms: Mapping[str, str]


def staged_parts(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    tapped: Sequence[TappedLayer],
    attentions: Sequence[AttentionLayer],
) -> StagedParts | None:
    """Return the stages of a network with attention layers; None if they are not joined as described above.

    Args:
        model: the network, in any mode; its values have no influence.
        taps: module names.
        sample: one batch.
        tapped: its layers before the last tap.
        attentions: its attention layers, in execution order.

    Raises:
        ModelError: a tap does not exist, or is not reached.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = [
        (size, tuple(group)) for size, group in groupby(attentions, lambda a: shapes[a.query.weight][1])
    ]
    if len({size for size, _ in groups}) < 2 or any(
        shapes[layer.output][0] != size for size, group in groups for layer in group
    ):
        return None
    norms = norms_before_matrices(model, taps, sample)
    order = [layer.weight for layer in tapped]
    merging: list[str] = []
    for (size, last), (next_size, first) in pairwise(groups):
        between = order[order.index(last[-1].output) + 1 : order.index(first[0].query.weight)]
        merging += _mergings(between, size, next_size, shapes, norms)
    reading = {weight for layer in attentions for weight in inputs(layer)}
    if len(merging) != len(groups) - 1 or not reading <= norms.keys():
        return None
    return _stages(model, taps, sample, tapped, groups, merging, norms)


def _stages(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    tapped: Sequence[TappedLayer],
    groups: Sequence[tuple[int, tuple[AttentionLayer, ...]]],
    merging: list[str],
    norms: Mapping[str, str],
) -> StagedParts:
    """Return the stages: each has the attention layers of one group, and begins with a patch merging."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    order = [layer.weight for layer in tapped]
    starts = [0, *map(order.index, merging), len(order)]
    kinds = {layer.weight: layer.kind for layer in tapped}
    inner = {weight for _, group in groups for layer in group for weight in layer.weights}
    stages = []
    for number, (size, group) in enumerate(groups):
        own = order[starts[number] : starts[number + 1]]
        linear = [w for w in own if kinds[w] == "linear" and w not in inner and w not in merging]
        readers = {w for layer in group for w in inputs(layer)}
        readers |= {w for w in linear if w in norms and shapes[w][1] == size}
        writers = {layer.output for layer in group}
        writers |= {w for w in linear if w not in readers and shapes[w][0] == size}
        sources = merging[number - 1 : number] if number else first_sources(model, tapped, group[0], size)
        stages.append(
            StreamStage(
                size=size,
                attentions=group,
                sources=tuple(sources),
                readers=frozenset(readers | set(merging[number : number + 1])),
                writers=frozenset(writers),
                first_norm=None if number else _first_norm(model, taps, sample, group[0], norms),
            )
        )
    read = frozenset().union(*(stage.readers for stage in stages))
    return StagedParts(tuple(stages), {weight: norms[weight] for weight in order if weight in read})


def inputs(layer: AttentionLayer) -> tuple[str, ...]:
    """Return the names of the matrices of an attention layer that read its inputs, each once."""
    return tuple(dict.fromkeys((layer.query.weight, layer.key.weight, layer.value.weight)))


def _mergings(
    between: Sequence[str],
    size: int,
    next_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    norms: Mapping[str, str],
) -> list[str]:
    """Return the matrices between two stages that read several vectors after one norm."""
    return [
        name
        for name in between
        if name in norms and shapes[name][0] == next_size
        if shapes[name][1] > size and shapes[name][1] % size == 0
    ]


def first_sources(
    model: nn.Module, tapped: Sequence[TappedLayer], first: AttentionLayer, size: int
) -> list[str]:
    """Return the tensors that start the stream before the first attention layer.

    Args:
        model: the network.
        tapped: its layers before the last tap.
        first: its first attention layer.
        size: numbers of one vector.
    """
    parameters = dict(model.named_parameters())
    end = [layer.weight for layer in tapped].index(first.query.weight)
    return [
        layer.weight
        for layer in tapped[:end]
        if _starts_stream(layer, model.get_submodule(layer.conv), parameters[layer.weight], size)
    ]


def _starts_stream(layer: TappedLayer, module: nn.Module, weight: Tensor, size: int) -> bool:
    """Return whether a weight holds vectors of the stream: an embedding, positions, or a patch kernel."""
    if layer.kind == "conv":
        return weight.shape[0] == size
    return (
        layer.kind == "other" and weight.shape[-1] == size and not isinstance(module, nn.MultiheadAttention)
    )


def _first_norm(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    first: AttentionLayer,
    norms: Mapping[str, str],
) -> str | None:
    """Return the norm that is used before the first attention layer and no matrix reads; None without one."""
    modules, size = dict(model.named_modules()), model.get_parameter(first.query.weight).shape[1]
    used = tapped_parameters(model, taps, sample, buffers=False)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in used[: used.index(first.query.weight)])
    candidates = [
        name
        for name in owners
        if is_row_norm(modules[name]) and name not in norms.values()
        if modules[name].get_parameter("weight").numel() == size
    ]
    return candidates[0] if len(candidates) == 1 else None
