"""Response bases: the leading directions of each layer's inputs on natural data.

For a layer with kernel rows w and inputs a, the variance of its response over natural inputs is
w·Cov(a)·wᵀ. The eigenvectors of Cov(a) with the largest eigenvalues span the part of the weights that natural
inputs excite. A row's coordinates along them cannot be changed without changing the layer's output
(docs/decisions/0016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.models.recurrent_layers import step_inputs
from mtlsign.models.residual_stream import ResidualStream, input_vectors, residual_stream
from mtlsign.models.taps import TappedLayer, forward_to_taps, tapped_layers

#: Training inputs from which the covariances are computed, and the samples of one pass.
MOMENT_INPUTS, _PASS = 1024, 32
#: Positions of a feature map that are used, on a regular grid; the others add time and little else.
_MAX_POSITIONS = 16
#: Share of the variance that a basis holds, and the largest number of its directions.
ENERGY, MAX_DIRECTIONS = 0.97, 256
#: Most directions of the products of attention layers, which have a row for each head and output.
MAX_ATTENTION_DIRECTIONS = 32


class InputMoments(NamedTuple):
    """Mean float64 [groups, fan-in] and covariance float64 [groups, fan-in, fan-in] of a layer's inputs."""

    mean: Tensor
    covariance: Tensor


def supports_responses(layer: TappedLayer, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a weight is that of a 2-d convolution, a linear, recurrent or attention layer.

    A module can have further weights, such as the gains of a scaled convolution.
    """
    module = modules[layer.conv]
    return layer.kind in ("recurrent", "attention") or (
        layer.kind != "other" and isinstance(module, nn.Conv2d | nn.Linear)
    )


def readable_layers(
    model: nn.Module, taps: Sequence[str], sample: Tensor, stream: ResidualStream | None
) -> list[TappedLayer]:
    """Return the layers before the last tap whose responses can be read, in execution order.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch.
        stream: residual stream of a transformer, whose attention layers are read as products; else None.
    """
    modules = dict(model.named_modules())
    layers = tapped_layers(model, taps, sample)
    if stream is not None:
        layers = stream.layers(layers)
    return [layer for layer in layers if supports_responses(layer, modules)]


def response_bases(
    model: nn.Module, taps: Sequence[str], inputs: Tensor, *, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Compute the response basis of every layer before the last tap.

    Args:
        model: the unmarked network W0, in any mode; it is evaluated with its running statistics.
        taps: module names.
        inputs: natural inputs: float32 [n, C, H, W] or int64 [n, L].
        layers: keys of layers (`TappedLayer.key`); None for all that `supports_responses` accepts.

    Returns:
        Key of a layer -> float16 [groups, fan-in of a group, k]: orthonormal columns, the leading direction
        first. k is the fewest directions with 97 % of the variance, at most 256.

    Raises:
        ModelError: a tap or a layer does not exist, or no layer is left.
    """
    stream = residual_stream(model, taps, inputs[:2])
    chosen = _marked_layers(model, taps, inputs[:2], layers, stream)
    moments = input_moments(model, taps, inputs, [layer.key for layer in chosen], stream=stream)
    return {layer.key: _basis(moments[layer.key].covariance, _most_directions(layer)) for layer in chosen}


def _most_directions(layer: TappedLayer) -> int:
    return MAX_ATTENTION_DIRECTIONS if layer.kind == "attention" else MAX_DIRECTIONS


def placeholder_bases(
    model: nn.Module, taps: Sequence[str], sample: Tensor, *, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return bases of the largest possible size without data, to check settings before phase 1.

    Args:
        model: a network of the architecture.
        taps: module names.
        sample: inputs of the task's geometry.
        layers: see `response_bases`.

    Raises:
        ModelError: as `response_bases`.
    """
    modules = dict(model.named_modules())
    stream, bases = residual_stream(model, taps, sample), {}
    for layer in _marked_layers(model, taps, sample, layers, stream):
        if layer.kind == "attention" and stream is not None:
            bases[layer.key] = torch.eye(stream.size)[:, :MAX_ATTENTION_DIRECTIONS].half()[None].clone()
            continue
        module, leaf = module_of_key(modules, layer.key)
        groups, fan_in = int(getattr(module, "groups", 1)), getattr(module, leaf)[0].numel()
        bases[layer.key] = torch.eye(fan_in)[:, :MAX_DIRECTIONS].half().expand(groups, -1, -1).clone()
    return bases


def _marked_layers(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    layers: Sequence[str] | None,
    stream: ResidualStream | None,
) -> list[TappedLayer]:
    """Return the layers to mark in execution order. Raises `ModelError` for unknown names."""
    candidates = readable_layers(model, taps, sample, stream)
    keys = [layer.key for layer in candidates]
    unknown = sorted(set(layers or ()) - set(keys))
    if unknown or not candidates or layers == []:
        raise ModelError(
            f"The name {', '.join(unknown)[:200]!r} is no layer before the taps whose responses can be read. "
            f"Choose among {', '.join(keys)[:400] or 'the layers of another model'}.",
            field="layers",
        )
    return [layer for layer in candidates if layers is None or layer.key in layers]


@torch.no_grad()
def input_moments(
    model: nn.Module,
    taps: Sequence[str],
    inputs: Tensor,
    names: Sequence[str],
    *,
    stream: ResidualStream | None = None,
) -> dict[str, InputMoments]:
    """Compute mean and covariance of the inputs of each layer.

    Args:
        model: in any mode; it is evaluated with its running statistics.
        taps: module names; the layers are before the last of them.
        inputs: natural inputs: float32 [n, C, H, W] or int64 [n, L].
        names: keys of layers (`TappedLayer.key`).
        stream: residual stream of a transformer. The inputs of its layers are then those of the norm before
            them without its gain, at the tokens that are no padding.
    """
    modules = dict(model.named_modules())
    tokens: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def collect(name: str, leaf: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if stream is None:
                patches = _input_vectors(module, leaf, inputs, tokens[-1]).double()
            else:
                patches = _stream_vectors(module, name, inputs, stream, tokens[-1]).double()
            # Covariances do not depend on an offset, and products lose fewer digits near 0.
            patches = patches - offsets.setdefault(name, patches.mean(1, keepdim=True))
            if name not in sums:
                groups, _, fan_in = patches.shape
                sums[name] = torch.zeros(groups, fan_in, dtype=torch.float64, device=patches.device)
                products[name] = torch.zeros(
                    groups, fan_in, fan_in, dtype=torch.float64, device=patches.device
                )
            sums[name] += patches.sum(1)
            products[name] += patches.transpose(1, 2) @ patches
            counts[name] += patches.shape[1]

        return hook

    modes = [(module, module.training) for module in model.modules()]
    handles = []
    for name in names:
        module, leaf = _hooked_module(modules, name, stream)
        handles.append(module.register_forward_pre_hook(collect(name, leaf), with_kwargs=True))
    model.eval()
    try:
        for batch in inputs.split(_PASS):
            tokens[:] = [batch]
            forward_to_taps(model, batch, taps)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    moments = {}
    for name in names:
        means = sums[name] / counts[name]
        covariance = products[name] / counts[name] - means.unsqueeze(2) * means.unsqueeze(1)
        # The last bits depend on the process. Without them, two runs give one reference on equal hardware.
        moments[name] = InputMoments(means + offsets[name].squeeze(1), covariance.float().double())
    return moments


def module_of_key(modules: Mapping[str, nn.Module], key: str) -> tuple[nn.Module, str]:
    """Return the module of a layer's key, and the name of the weight in it."""
    if key in modules:
        return modules[key], "weight"
    owner, _, leaf = key.rpartition(".")
    return modules[owner], leaf


def _hooked_module(
    modules: Mapping[str, nn.Module], key: str, stream: ResidualStream | None
) -> tuple[nn.Module, str]:
    """Return the module whose inputs belong to a layer's key, and the name of the weight in it."""
    if stream is not None and key in stream.norms:
        return modules[stream.norms[key]], "weight"
    for attention in () if stream is None else stream.attentions:
        if key in (attention.query_key, attention.value_output):
            return modules[attention.query.weight.rpartition(".")[0]], "weight"
    return module_of_key(modules, key)


def _stream_vectors(
    module: nn.Module, key: str, inputs: Tensor, stream: ResidualStream, tokens: Tensor
) -> Tensor:
    """Return the vectors that a layer of a transformer reads: [1, vectors, fan-in]."""
    if isinstance(module, nn.Conv2d):
        return input_patches(module, inputs)
    return _without_padding(input_vectors(module if key in stream.norms else None, inputs), tokens)


def _without_padding(vectors: Tensor, tokens: Tensor) -> Tensor:
    """Return vectors [..., d] of the tokens that are no padding, or of all images: [1, vectors, d]."""
    if not tokens.is_floating_point() and vectors.shape[:2] == tokens.shape:
        return vectors[tokens != 0][None]
    return vectors.reshape(1, -1, vectors.shape[-1])


def _input_vectors(module: nn.Module, leaf: str, inputs: Any, tokens: Tensor) -> Tensor:
    """Return the vectors that the rows of one weight are multiplied with: [groups, vectors, fan-in]."""
    if isinstance(module, nn.LSTM | nn.GRU):
        return step_inputs(module, inputs)[leaf][None]
    if isinstance(module, nn.Linear):
        return _without_padding(inputs, tokens)
    return input_patches(module, inputs)


def input_patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the input vectors that the rows of a layer's kernel are multiplied with.

    Args:
        module: a two-dimensional convolution or a linear layer.
        inputs: input of the layer, [n, C, H, W] or [..., C].

    Returns:
        [groups, vectors, fan-in of a group]; at most 16 positions of an image, on a regular grid.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding: Any = 0
    elif module.padding == "same":
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice)
        padding = 0
    else:
        padding = 0 if module.padding == "valid" else module.padding
    patches = F.unfold(
        inputs, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
    )
    positions = patches.shape[2]
    if positions > _MAX_POSITIONS:
        chosen = torch.linspace(0, positions - 1, _MAX_POSITIONS, device=patches.device).round().long()
        patches = patches[:, :, chosen]
    grouped = patches.reshape(len(patches), module.groups, -1, patches.shape[2])
    return grouped.permute(1, 0, 3, 2).reshape(module.groups, -1, grouped.shape[2])


def _basis(covariance: Tensor, most_directions: int) -> Tensor:
    """Return the leading eigenvectors as columns: float16 [groups, fan-in, k]."""
    most = min(most_directions, covariance.shape[1])
    pairs = [_leading_eigenvectors(matrix.cpu().numpy(), most) for matrix in covariance]
    values = torch.from_numpy(np.stack([pair[0] for pair in pairs]))
    vectors = torch.from_numpy(np.stack([pair[1] for pair in pairs]))
    total = covariance.diagonal(dim1=1, dim2=2).sum().cpu().clamp(min=1e-300)
    k = min(most, int((values.sum(0).cumsum(0) / total < ENERGY).sum()) + 1)
    # The sign of an eigenvector is arbitrary; its largest element is made positive.
    largest = vectors.abs().argmax(1, keepdim=True)
    vectors = vectors * torch.where(vectors.gather(1, largest) < 0, -1.0, 1.0)
    return vectors[:, :, :k].half()


def _leading_eigenvectors(
    covariance: npt.NDArray[np.float64], count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the `count` largest eigenvalues, at least 0, and their vectors as columns, largest first."""
    size = len(covariance)
    if not covariance.any():  # constant inputs
        return np.zeros(count), np.eye(size, count)
    # Not scipy.sparse.linalg.eigsh, which gives other digits in each process.
    values, vectors = scipy.linalg.eigh(covariance, subset_by_index=(size - count, size - 1))
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1].copy()
