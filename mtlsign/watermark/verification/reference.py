"""Reference: values of the unmarked W0 that the verifier needs (docs/decisions/0003).

It holds batch-norm values, column norms and a sketch of W0's rows. It is made after phase 1, before the key
exists, and its digest is hashed into the key. Another reference therefore gives another key. A claim opens
the reference; W0's kernels remain secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.batch_norms import batch_norm_values
from mtlsign.models.channel_sets import channel_structure
from mtlsign.models.linear_channels import SUFFIX, LinearProduct, linear_products
from mtlsign.models.residual_stream import residual_stream
from mtlsign.models.taps import TappedLayer, tapped_buffers, tapped_layers, tapped_parameters
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.verification.attention_products import AttentionProducts
from mtlsign.watermark.verification.embedding_frame import embedding_rows
from mtlsign.watermark.verification.linear_products import LinearProducts, ProductSketch
from mtlsign.watermark.verification.scaling import apply_bn_sign, column_norms
from mtlsign.watermark.verification.sketches import MAX_SKETCH_SIZE, random_projection
from mtlsign.watermark.verification.stream_frame import stream_tensors

MAX_REFERENCE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class ValueRange:
    """Type and limits of one kind of tensor of a reference. Within them, rounding decides no score."""

    dtype: torch.dtype
    low: float
    high: float


#: By the last part of the name.
RANGES = {
    "gamma": ValueRange(torch.float32, 0.0, 2.0**10),
    "beta": ValueRange(torch.float32, -(2.0**10), 2.0**10),
    "eps": ValueRange(torch.float64, 2.0**-20, 1.0),
    "columns": ValueRange(torch.float64, 0.0, 2.0**10),
    "basis": ValueRange(torch.float16, -2.0, 2.0),
    "sketch": ValueRange(torch.float16, -(2.0**10), 2.0**10),
    "rows": ValueRange(torch.float16, -(2.0**10), 2.0**10),
    "mean": ValueRange(torch.float32, -(2.0**10), 2.0**10),
    "axes": ValueRange(torch.float32, -(2.0**20), 2.0**20),
}
#: Tensors stored whole, as `=NAME`.
WHOLE = ValueRange(torch.float32, -(2.0**24), 2.0**24)


@dataclass(frozen=True)
class Reference:
    """Canonical-form values of W0.

    For each tapped convolution C that a batch norm follows, there are five tensors: `C/gamma` |γ0| and
    `C/beta` float32 [O], `C/eps` float64 [1], `C/columns` float64 [groups, I/groups], `C/sketch` float16
    [O, s]. A spread head adds `L/basis`, `L/columns` and `L/sketch` for each layer L that it marks, and
    `E/rows` float16 [r, d] for an embedding E: the vectors of its first r ids; with `E/mean` and `E/axes` of
    the whole vocabulary. A keyed or free head adds the sketches of recurrent matrices and the word vectors.
    For a transformer a spread head adds rows for every source of the residual stream. Across linear channels
    L is the product of two kernels, see `linear_channels.py`. Every other
    parameter of the tapped part with fewer than two dimensions (biases, layer norms), and every
    floating-point buffer of it that a state dict has and that belongs to no batch norm, is stored whole as
    `=NAME`.

    Attributes:
        raw_bytes: the exact safetensors bytes; their SHA-256 is in the spec.
        tensors: the parsed tensors.
    """

    raw_bytes: bytes
    tensors: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, hex."""
        return hashlib.sha256(self.raw_bytes).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Parse an opened reference of at most 64 MiB.

        Raises:
            ArtifactError: the bytes are too many or damaged, or hold a tensor of another type than the
                format's, or a number outside its range.
        """
        if len(data) > MAX_REFERENCE_BYTES:
            raise ArtifactError(
                f"The reference has over {MAX_REFERENCE_BYTES} bytes. Use the reference of the same kit.",
                field="reference",
            )
        try:
            tensors = parse_safetensors(data, max_bytes=MAX_REFERENCE_BYTES)
        except ModelError as error:
            raise ArtifactError(
                f"The reference cannot be read ({error}). Use the reference of the same kit.",
                field="reference",
            ) from None
        for name, tensor in tensors.items():
            problem = _problem(name, tensor)
            if problem:
                raise ArtifactError(
                    f"A tensor of the reference {problem}. Use the reference of the same kit.",
                    field="reference",
                )
        return cls(data, tensors)


def _problem(name: str, tensor: Tensor) -> str:
    """Return how a tensor of a reference differs from the format, or an empty text."""
    limits = WHOLE if name.startswith("=") else RANGES.get(name.rpartition("/")[2])
    if limits is None:
        return "has a name that the format does not have"
    if tensor.dtype != limits.dtype:
        return f"is {tensor.dtype}, not {limits.dtype}"
    values = tensor.double()
    if not bool(((values >= limits.low) & (values <= limits.high)).all()):  # false for NaN
        return f"has a number that is not between {limits.low:g} and {limits.high:g}"
    return ""


def reference_tensor(reference: Reference, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a floating-point tensor of the reference.

    Raises:
        ArtifactError: the tensor is missing or has another type or shape.
    """
    tensor = reference.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
        raise ArtifactError(
            f"The reference does not fit the architecture at {name!r}. Use that of the same kit.",
            field="reference",
        )
    return tensor


def make_reference(
    model: nn.Module, taps: Sequence[str], sample: Tensor, *, bases: Mapping[str, Tensor] | None = None
) -> Reference:
    """Extract from the base model the values that the verifier needs.

    Args:
        model: the unmarked network W0, in any mode.
        taps: module names.
        sample: float32 [1, C, H, W], any input of the carrier's geometry; only its shape matters.
        bases: response bases of the layers that a spread head marks, by key.

    Raises:
        ModelError: a tap does not exist, or the network has a value outside the format's ranges.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    tensors, kernels = _stream_values(model, taps, sample, bases or {})
    handled: set[str] = set()
    layers = tapped_layers(model, taps, sample)
    if bases and any(key.endswith(SUFFIX) for key in bases):
        tensors |= _product_values(model, found_products(model, taps, sample), bases)
    for layer in layers:
        # A module can have further weights, such as the gains of a scaled convolution.
        if bases and layer.key in bases and layer.kind != "other":
            groups = int(getattr(modules[layer.conv], "groups", 1))
            kernel = kernels.get(layer.weight, parameters[layer.weight]).detach().float().cpu()
            tensors |= _layer_values(layer.key, bases[layer.key], kernel, groups)
        elif layer.kind == "recurrent" and not kernels:
            matrix = parameters[layer.weight].detach().float().cpu()
            tensors[f"{layer.key}/sketch"] = random_projection(matrix)
        if layer.batch_norm is None:
            continue
        tensors |= _conv_values(layer, parameters[layer.weight], modules)
        handled |= {f"{layer.batch_norm}.weight", f"{layer.batch_norm}.bias", f"{layer.conv}.bias"}
    if not kernels and (bases or any(layer.kind == "recurrent" for layer in layers)):
        tensors |= embedding_rows(model, taps, sample)
    for name in tapped_parameters(model, taps, sample):
        if name not in handled and name in parameters and parameters[name].dim() < 2:
            tensors[f"={name}"] = parameters[name].detach().float().cpu().clone()
    state = model.state_dict()
    for name in tapped_buffers(model, taps, sample):
        if name in state:
            tensors[f"={name}"] = state[name].detach().float().cpu().clone()
    for name, tensor in tensors.items():
        if problem := _problem(name, tensor):
            raise ModelError(
                f"{name!r} {problem}. A verifier refuses such a network: change this value.", field="model"
            )
    data = serialize_safetensors(tensors)
    return Reference(data, parse_safetensors(data))


def _layer_values(key: str, basis: Tensor, kernel: Tensor, groups: int = 1) -> dict[str, Tensor]:
    """Return the reference's tensors of one layer that a spread head marks."""
    return {
        f"{key}/basis": basis,
        f"{key}/columns": column_norms(kernel, groups),
        f"{key}/sketch": random_projection(kernel),
    }


def _stream_values(
    model: nn.Module, taps: Sequence[str], sample: Tensor, bases: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the reference's tensors of a transformer, and its kernels as they are read; none for others."""
    stream = residual_stream(model, taps, sample) if bases else None
    if stream is None:
        return {}, {}
    parameters = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    products = AttentionProducts.of(stream, bases, parameters)
    kernels = products.apply(parameters)
    tensors = stream_tensors(model, stream)
    for name in products.shapes:
        if name in bases:
            tensors |= _layer_values(name, bases[name], kernels[name])
    return tensors, kernels


def found_products(model: nn.Module, taps: Sequence[str], sample: Tensor) -> list[LinearProduct]:
    """Return the products across the linear channels of a network; none for transformers and texts.

    Args:
        model: the network; its values have no influence.
        taps: module names.
        sample: one batch.
    """
    layers = tapped_layers(model, taps, sample)
    image = sample.is_floating_point() and sample.dim() == 4
    if not image or any(layer.kind == "recurrent" for layer in layers):
        return []
    return linear_products(model, layers, channel_structure(model, taps, sample))


def products_of_reference(
    template_model: nn.Module, taps: Sequence[str], sample: Tensor, reference: Reference
) -> LinearProducts | None:
    """Return the products that a reference describes; None if it describes none.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names.
        sample: one batch.
        reference: W0's reference.

    Raises:
        ArtifactError: a description has another shape than the architecture's product.
    """
    ending = f"{SUFFIX}/basis"
    names = {name.removesuffix("/basis") for name in reference.tensors if name.endswith(ending)}
    if not names:
        return None
    products = [p for p in found_products(template_model, taps, sample) if p.name in names]
    eps, sketches = {}, {}
    for product in products:
        stored = reference.tensors.get(f"{product.name}/sketch")
        size = min(stored.shape[-1] if stored is not None and stored.dim() else 1, MAX_SKETCH_SIZE)
        sketch = reference_tensor(reference, f"{product.name}/sketch", (product.shape[0], size))
        columns = reference_tensor(reference, f"{product.name}/columns", (1, product.shape[1]))
        sketches[product.name] = ProductSketch(sketch.double().cpu(), columns.double())
        eps[product.name] = float(reference_tensor(reference, f"{product.writer}/eps", (1,)))
    return LinearProducts(products, eps, sketches) if products else None


def _product_values(
    model: nn.Module, products: Sequence[LinearProduct], bases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the reference's tensors of W0's products."""
    norms = {p.name: batch_norm_values(model.get_submodule(p.writer_norm)) for p in products}
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    kernels = LinearProducts(products, {name: norm.eps for name, norm in norms.items()}, {}).apply(state)
    tensors: dict[str, Tensor] = {}
    for product in products:
        if product.name in bases:
            gamma = None
            if product.reader_norm is not None:
                gamma = batch_norm_values(model.get_submodule(product.reader_norm)).gamma
            kernel = apply_bn_sign(kernels[product.name], gamma)
            tensors |= _layer_values(product.name, bases[product.name], kernel)
    return tensors


def _conv_values(layer: TappedLayer, weight: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the reference's tensors of one convolution and the batch norm after it."""
    assert layer.batch_norm is not None
    gamma, beta, eps = batch_norm_values(modules[layer.batch_norm])
    groups = int(getattr(modules[layer.conv], "groups", 1))
    kernel = apply_bn_sign(weight.detach().cpu(), gamma)
    return {
        f"{layer.conv}/gamma": gamma.abs().clone(),
        f"{layer.conv}/beta": beta.clone(),
        f"{layer.conv}/eps": torch.tensor([eps], dtype=torch.float64),
        f"{layer.conv}/columns": column_norms(kernel, groups),
        f"{layer.conv}/sketch": random_projection(kernel),
    }
