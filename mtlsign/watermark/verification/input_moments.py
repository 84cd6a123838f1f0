"""Moments of the inputs of layers on natural data: mean and covariance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.models.linear_channels import LinearProduct
from mtlsign.models.recurrent_layers import step_inputs
from mtlsign.models.residual_stream import ResidualStream, input_vectors
from mtlsign.models.taps import eval_mode, forward_to_taps

#: Samples of one pass.
_PASS = 32
#: Positions of a feature map that are used, on a regular grid; the others add time and little else.
_MAX_POSITIONS = 16


class InputMoments(NamedTuple):
    """Mean float64 [groups, fan-in] and covariance float64 [groups, fan-in, fan-in] of a layer's inputs."""

    mean: Tensor
    covariance: Tensor


class _Sums:
    """Sums over the inputs of one layer."""

    def __init__(self) -> None:
        self._count = 0
        self._offset = self._sum = self._products = torch.zeros(())

    def add(self, vectors: Tensor) -> None:
        """Add float64 [groups, vectors, fan-in]."""
        if not self._count:  # Covariances do not depend on an offset, and products lose fewer digits near 0.
            groups, _, fan_in = vectors.shape
            self._offset = vectors.mean(1, keepdim=True)
            self._sum = vectors.new_zeros(groups, fan_in)
            self._products = vectors.new_zeros(groups, fan_in, fan_in)
        vectors = vectors - self._offset
        self._sum += vectors.sum(1)
        self._products += vectors.transpose(1, 2) @ vectors
        self._count += vectors.shape[1]

    def moments(self) -> InputMoments:
        """Return mean and covariance of all vectors."""
        means = self._sum / self._count
        covariance = self._products.div_(self._count)
        covariance -= means.unsqueeze(2) * means.unsqueeze(1)
        # The last bits depend on the process. Without them, two runs give one reference on equal hardware.
        return InputMoments(means + self._offset.squeeze(1), covariance.float().double())


@torch.no_grad()
def input_moments(
    model: nn.Module,
    taps: Sequence[str],
    inputs: Tensor,
    names: Sequence[str],
    *,
    stream: ResidualStream | None = None,
    products: Sequence[LinearProduct] = (),
) -> dict[str, InputMoments]:
    """Compute mean and covariance of the inputs of each layer.

    Args:
        model: in any mode; it is evaluated with its running statistics.
        taps: module names; the layers are before the last of them.
        inputs: natural inputs: float32 [n, C, H, W] or int64 [n, L].
        names: keys of layers (`TappedLayer.key`).
        stream: residual stream of a transformer. The inputs of its layers are then those of the norm before
            them without its gain, at the tokens that are no padding.
        products: across linear channels. Their inputs are those of the kernel that writes the channels, in
            the window of the product.
    """
    crossing = {product.name: product for product in products}
    modules = dict(model.named_modules())
    tokens: list[Tensor] = []
    sums = {name: _Sums() for name in names}

    def collect(name: str, leaf: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = args[0] if args else next(iter(kwargs.values()))
            if name in crossing:
                vectors = input_patches(modules[crossing[name].window_of], values)
            elif stream is None:
                vectors = _input_vectors(module, leaf, values, tokens[-1])
            else:
                vectors = _stream_vectors(module, name, values, stream, tokens[-1])
            sums[name].add(vectors.double())

        return hook

    handles = []
    for name in names:
        hooked = crossing[name].writer if name in crossing else name
        module, leaf = _hooked_module(modules, hooked, stream)
        handles.append(module.register_forward_pre_hook(collect(name, leaf), with_kwargs=True))
    try:
        with eval_mode(model):
            for batch in inputs.split(_PASS):
                tokens[:] = [batch]
                forward_to_taps(model, batch, taps)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums.pop(name).moments() for name in names}  # a large layer has gigabytes of sums


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
