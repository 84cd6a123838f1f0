"""Response model: the responses of every marked layer on natural inputs, without running a network.

Each layer is read with W0's inputs: the reference holds a basis of their covariance for each marked layer,
and a row of the suspect's kernel times this basis gives its response. The model needs matrix products only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError
from mtlsign.models.linear_channels import LinearProduct
from mtlsign.models.residual_stream import ResidualStream, residual_stream
from mtlsign.models.taps import TappedLayer
from mtlsign.watermark.verification.attention_products import AttentionProducts
from mtlsign.watermark.verification.conv_model import apply_bn_signs
from mtlsign.watermark.verification.embedding_frame import embedding_frame
from mtlsign.watermark.verification.model import Weights
from mtlsign.watermark.verification.reference import Reference, products_of_reference, reference_tensor
from mtlsign.watermark.verification.response_bases import MAX_DIRECTIONS, readable_layers
from mtlsign.watermark.verification.scaling import column_multipliers

#: Largest number of coordinates of all layers together.
MAX_COORDINATES = 2**24


@dataclass(frozen=True)
class MarkedLayer:
    """Layer whose responses are read.

    Attributes:
        weight: name of its kernel, [O, I/groups, ...], or of the products of an attention layer.
        rows: O.
        batch_norm: name of the batch norm after it, or None.
        groups: the convolution's groups.
        columns: W0's column norms, float64 [groups, I/groups].
        basis: [groups, fan-in of a group, k], in the type of the reference, because a service keeps many.
    """

    weight: str
    rows: int
    batch_norm: str | None
    groups: int
    columns: Tensor
    basis: Tensor

    def basis_in(self, dtype: torch.dtype) -> Tensor:
        """Return the basis in float64 for verification, or in float32 for training, where it is kept."""
        return self._basis32 if dtype == torch.float32 else self.basis.to(dtype)

    @cached_property
    def _basis32(self) -> Tensor:
        return self.basis.float()


class ResponseModel:
    """Responses of the marked layers: those with a basis in the reference.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names; the marked layers are before the last of them.
        reference: W0's reference.
        sample: inputs of the network's geometry.

    Attributes:
        layers: the marked layers in execution order.
        kernel_shapes: name -> shape of every kernel that `select_weights` returns.
        weight_shapes: name -> shape of every tensor of the network that they are made of.
        products: how the kernels of attention layers are made; None without any.
        linear: how the products across linear channels are made; None without any.
        optional_shapes: name -> shape of the batch norms' γ, which may be absent, and of an embedding,
            without which the layers that read it contribute zeros.
        coordinates: D, the number of coordinates of all layers together.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """

    def __init__(
        self, template_model: nn.Module, taps: Sequence[str], reference: Reference, sample: Tensor
    ) -> None:
        modules = dict(template_model.named_modules())
        shapes = {name: tuple(p.shape) for name, p in template_model.named_parameters()}
        self.products = attention_products(template_model, taps, sample, reference)
        stream = None if self.products is None else self.products.stream
        self.linear = products_of_reference(template_model, taps, sample, reference)
        crossing = [] if self.linear is None else self.linear.products
        kernel_shapes = {**shapes, **({} if self.products is None else self.products.shapes)}
        kernel_shapes |= {product.name: product.shape for product in crossing}
        self.layers = tuple(
            _marked_layer(layer, modules[layer.conv], kernel_shapes[layer.weight], reference, sample.device)
            for layer in readable_layers(template_model, taps, sample, stream, crossing)
            if f"{layer.key}/basis" in reference.tensors
        )
        bases = sum(name.endswith("/basis") for name in reference.tensors)
        if not self.layers or bases != len(self.layers):
            raise ArtifactError(
                "The reference does not hold the bases of layers before the taps. Use that of the same kit.",
                field="reference",
            )
        self.kernel_shapes: Mapping[str, tuple[int, ...]] = {
            layer.weight: kernel_shapes[layer.weight] for layer in self.layers
        }
        self.weight_shapes: Mapping[str, tuple[int, ...]] = {
            name: shapes[name] for name in _matrix_names(self.kernel_shapes, stream, crossing)
        }
        self._bn_weights = {
            layer.weight: f"{layer.batch_norm}.weight" for layer in self.layers if layer.batch_norm
        }
        self._frame = embedding_frame(template_model, taps, sample, reference.tensors)
        self.optional_shapes: Mapping[str, tuple[int, ...]] = {
            bn_weight: (self.kernel_shapes[weight][0],) for weight, bn_weight in self._bn_weights.items()
        }
        if self._frame is not None:
            self.optional_shapes = {**self.optional_shapes, self._frame.weight: self._frame.shape}
        if self.linear is not None:
            self.optional_shapes = {**self.linear.vector_shapes, **self.optional_shapes}
        if stream is not None:
            gains = [stream.gains[name] for name in self.weight_shapes if name in stream.gains]
            self.optional_shapes = {**self.optional_shapes, **{name: shapes[name] for name in gains}}
        self.coordinates = sum(layer.rows * layer.basis.shape[2] for layer in self.layers)
        if self.coordinates > MAX_COORDINATES:
            raise ArtifactError(
                f"The reference has {self.coordinates:,} coordinates, over {MAX_COORDINATES:,}. "
                "Mark fewer layers.",
                field="reference",
            )

    @cached_property
    def byte_count(self) -> int:
        """Bytes of the tensors that the model keeps."""
        return sum(t.numel() * t.element_size() for x in self.layers for t in (x.basis, x.columns))

    def select_weights(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the kernels that are present, with sign(γ) on their rows; γ may be absent.

        Layers that read an embedding are returned in the coordinates of W0's word vectors, and the products
        of attention layers and across linear channels instead of their matrices.
        """
        names = [name for name in (*self.weight_shapes, *self.optional_shapes) if name in tensors]
        kernels = {name: tensors[name] for name in names}
        if self._frame is not None:
            kernels = self._frame.apply(kernels)
        if self.products is not None:
            kernels = self.products.apply(kernels)
        if self.linear is not None:
            kernels = self.linear.apply(kernels, {*self.kernel_shapes, *self._bn_weights.values()})
        return apply_bn_signs(kernels, self._bn_weights)

    def responses(self, kernels: Weights, *, differentiable_rounds: int = 0) -> Tensor:
        """Compute the coordinates of all marked layers.

        Args:
            kernels: result of `select_weights`. A layer without a kernel contributes zeros.
            differentiable_rounds: 0 for verification, which computes in double precision. In training this
                many rounds of the column scaling are differentiated, in the kernels' own precision.

        Returns:
            [D], layer after layer and row after row; each row has mean square 1, or is 0.
        """
        parts, device = [], self.layers[0].basis.device
        for layer in self.layers:
            if layer.weight in kernels:
                parts.append(_layer_responses(kernels[layer.weight], layer, differentiable_rounds))
            else:
                size = layer.rows * layer.basis.shape[2]
                parts.append(torch.zeros(size, dtype=torch.float64, device=device))
        return torch.cat(parts)


def _layer_responses(kernel: Tensor, layer: MarkedLayer, differentiable_rounds: int) -> Tensor:
    """Return the responses of one layer's rows as one vector, [O·k]."""
    training = differentiable_rounds > 0
    dtype = kernel.dtype if training else torch.float64
    blocks = kernel.to(dtype).reshape(layer.groups, -1, kernel.shape[1], kernel[0, 0].numel())
    columns = column_multipliers(
        blocks.square().sum(3).double(), layer.columns, differentiable_rounds=differentiable_rounds
    )
    scaled = blocks * columns.sqrt().to(dtype)[:, None, :, None]
    responses = (scaled.flatten(2) @ layer.basis_in(dtype)).flatten(0, 1)
    norms = responses.square().sum(1, keepdim=True)
    # Rows of zeros remain zeros.
    inverse = (norms + (norms <= 0)).rsqrt()
    unit: Tensor = responses * (inverse * responses.shape[1] ** 0.5)
    return unit.flatten()


def _marked_layer(
    layer: TappedLayer,
    module: nn.Module,
    shape: tuple[int, ...],
    reference: Reference,
    device: torch.device,
) -> MarkedLayer:
    groups = int(getattr(module, "groups", 1))
    fan_in = shape[1] * (torch.Size(shape[2:]).numel() if len(shape) > 2 else 1)
    columns = reference_tensor(reference, f"{layer.key}/columns", (groups, shape[1]))
    basis = reference.tensors[f"{layer.key}/basis"]
    if (
        not basis.dtype.is_floating_point
        or basis.dim() != 3
        or tuple(basis.shape[:2]) != (groups, fan_in)
        or not 1 <= basis.shape[2] <= MAX_DIRECTIONS
    ):
        raise _misfit(f"{layer.key}/basis")
    columns = columns.double().to(device)
    return MarkedLayer(layer.weight, shape[0], layer.batch_norm, groups, columns, basis.to(device))


def attention_products(
    template_model: nn.Module, taps: Sequence[str], sample: Tensor, reference: Reference
) -> AttentionProducts | None:
    """Return how the kernels of attention layers are made; None if the reference describes none.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names.
        sample: one batch.
        reference: W0's reference.

    Raises:
        ArtifactError: a basis of the reference has another shape.
    """
    if not any(name.endswith((".query_key/basis", ".value_output/basis")) for name in reference.tensors):
        return None
    stream = residual_stream(template_model, taps, sample)
    if stream is None:
        return None
    bases: dict[str, Tensor] = {}
    for layer in stream.attentions:
        basis = reference.tensors.get(f"{layer.query_key}/basis")
        if basis is None:
            continue
        if basis.dim() != 3 or basis.shape[:2] != (1, stream.size) or basis.shape[2] > MAX_DIRECTIONS:
            raise _misfit(f"{layer.query_key}/basis")
        bases[layer.query_key] = basis.to(sample.device)
    return AttentionProducts.of(stream, bases, dict(template_model.named_parameters()))


def _matrix_names(
    kernels: Mapping[str, object], stream: ResidualStream | None, crossing: Sequence[LinearProduct]
) -> list[str]:
    """Return the tensors of a network that kernels are made of, each once."""
    made_of: dict[str, tuple[str, ...]] = {product.name: product.weights for product in crossing}
    for layer in () if stream is None else stream.attentions:
        made_of |= {layer.query_key: layer.weights, layer.value_output: layer.weights}
    return list(dict.fromkeys(part for name in kernels for part in made_of.get(name, (name,))))


def _misfit(name: str) -> ArtifactError:
    return ArtifactError(
        f"The reference does not fit the architecture at {name!r}. Use that of the same kit.",
        field="reference",
    )
