"""Response bases: the leading directions of each layer's inputs on natural data.

For a layer with kernel rows w and inputs a, the variance of its response over natural inputs is
w·Cov(a)·wᵀ. The eigenvectors of Cov(a) with the largest eigenvalues span the part of the weights that natural
inputs excite. A row's coordinates along them cannot be changed without changing the layer's output
(docs/decisions/0016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.linear_channels import LinearProduct
from mtlsign.models.residual_stream import ResidualStream, residual_stream
from mtlsign.models.taps import TappedLayer, tapped_layers
from mtlsign.watermark.verification.attention_products import AttentionProducts
from mtlsign.watermark.verification.input_moments import input_moments, module_of_key
from mtlsign.watermark.verification.reference import found_products

#: Training inputs from which the covariances are computed.
MOMENT_INPUTS = 1024
#: Share of the variance that a basis holds, and the largest number of its directions.
ENERGY, MAX_DIRECTIONS = 0.97, 256
#: Most coordinates of all layers together.
COORDINATES = 2**23
#: Most directions of the products of attention layers, which have a row for each head and output.
MAX_ATTENTION_DIRECTIONS = 32


def supports_responses(layer: TappedLayer, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a weight can be marked.

    It is that of a two-dimensional convolution, a linear, recurrent or attention layer, or a product. A
    module can have further weights, such as the gains of a scaled convolution.
    """
    module = modules[layer.conv]
    return layer.kind in ("recurrent", "attention", "product") or (
        layer.kind != "other" and isinstance(module, nn.Conv2d | nn.Linear)
    )


def readable_layers(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    stream: ResidualStream | None,
    products: Sequence[LinearProduct] = (),
) -> list[TappedLayer]:
    """Return the layers before the last tap whose responses can be read, in execution order.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch.
        stream: residual stream of a transformer, whose attention layers are read as products; else None.
        products: across linear channels. Each follows the kernel that reads the channels.
    """
    modules = dict(model.named_modules())
    layers = tapped_layers(model, taps, sample)
    if stream is not None:
        layers = stream.layers(layers)
    crossing = {product.weights[0]: product.layer for product in products}
    layers = [
        own
        for layer in layers
        for own in ([layer, crossing[layer.weight]] if layer.weight in crossing else [layer])
    ]
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
        first. k is the fewest directions with 97 % of the variance, at most 256, and fewer if there are over
        2^23 coordinates otherwise.

    Raises:
        ModelError: a tap or a layer does not exist, or no layer is left.
    """
    stream = residual_stream(model, taps, inputs[:2])
    products = [] if stream is not None else found_products(model, taps, inputs[:2])
    chosen = _marked_layers(model, taps, inputs[:2], layers, stream, products)
    moments = input_moments(
        model, taps, inputs, [layer.key for layer in chosen], stream=stream, products=products
    )
    bases = {
        layer.key: _basis(moments.pop(layer.key).covariance, _most_directions(layer)) for layer in chosen
    }
    return _bounded(bases, _row_counts(model, chosen, stream, bases, products))


def _row_counts(
    model: nn.Module,
    layers: Sequence[TappedLayer],
    stream: ResidualStream | None,
    bases: Mapping[str, Tensor],
    products: Sequence[LinearProduct],
) -> dict[str, int]:
    """Return the number of rows of each layer by its key."""
    parameters = dict(model.named_parameters())
    rows = {layer.key: len(parameters[layer.weight]) for layer in layers if layer.weight in parameters}
    rows |= {product.name: product.shape[0] for product in products}
    if stream is not None:
        shapes = AttentionProducts.of(stream, bases, parameters).shapes
        rows |= {name: shape[0] for name, shape in shapes.items()}
    return rows


def _bounded(bases: dict[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Leave out the last directions of large networks, so that there are at most `COORDINATES`."""
    most = MAX_DIRECTIONS
    while most > 1 and sum(rows[key] * min(most, b.shape[2]) for key, b in bases.items()) > COORDINATES:
        most //= 2
    return {key: basis[:, :, :most].contiguous() for key, basis in bases.items()}


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
    products = [] if stream is not None else found_products(model, taps, sample)
    shapes = {product.name: product.shape for product in products}
    chosen = _marked_layers(model, taps, sample, layers, stream, products)
    for layer in chosen:
        if layer.key in shapes:
            fan_in = torch.Size(shapes[layer.key][1:]).numel()
            bases[layer.key] = torch.eye(fan_in)[:, :MAX_DIRECTIONS].half()[None].clone()
            continue
        if layer.kind == "attention" and stream is not None:
            bases[layer.key] = torch.eye(stream.size)[:, :MAX_ATTENTION_DIRECTIONS].half()[None].clone()
            continue
        module, leaf = module_of_key(modules, layer.key)
        groups, fan_in = int(getattr(module, "groups", 1)), getattr(module, leaf)[0].numel()
        bases[layer.key] = torch.eye(fan_in)[:, :MAX_DIRECTIONS].half().expand(groups, -1, -1).clone()
    return _bounded(bases, _row_counts(model, chosen, stream, bases, products))


def _marked_layers(
    model: nn.Module,
    taps: Sequence[str],
    sample: Tensor,
    layers: Sequence[str] | None,
    stream: ResidualStream | None,
    products: Sequence[LinearProduct],
) -> list[TappedLayer]:
    """Return the layers to mark in execution order.

    Kernels of a product are marked through it, also if `layers` names one of them.

    Raises:
        ModelError: a name is unknown, or there is no layer.
    """
    through: dict[str, list[str]] = {}
    for product in products:
        for owner in (product.reader, product.writer):
            through.setdefault(owner, []).append(product.name)
    readable = readable_layers(model, taps, sample, stream, products)
    candidates = [layer for layer in readable if layer.key not in through]
    keys = [layer.key for layer in readable]
    unknown = sorted(set(layers or ()) - set(keys))
    if unknown or not candidates or layers == []:
        raise ModelError(
            f"The name {', '.join(unknown)[:200]!r} is no layer before the taps whose responses can be read. "
            f"Choose among {', '.join(keys)[:400] or 'the layers of another model'}.",
            field="layers",
        )
    targets = {key for name in layers or () for key in through.get(name, [name])}
    return [layer for layer in candidates if layers is None or layer.key in targets]


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
