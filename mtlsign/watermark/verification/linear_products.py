"""Products of kernels across linear channels, which no mix of these channels can move (docs/decisions/0024).

Of a kernel P that writes linear channels and a kernel E that reads them, with the batch norm D after P, M·D·P
and E·M⁻¹ compute the same for every invertible matrix M. The product E·D·P remains. Its rows are those of E,
and its columns those of P.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlsign.models.linear_channels import LinearProduct
from mtlsign.watermark.verification.model import Weights, rounded
from mtlsign.watermark.verification.scaling import column_multipliers, squared_block_norms
from mtlsign.watermark.verification.sketches import projection_matrix


@dataclass(frozen=True)
class ProductSketch:
    """Description of one product of W0: rows of the sketch, float64 [O, s], and column norms [1, I]."""

    sketch: Tensor
    columns: Tensor


@dataclass(frozen=True)
class LinearProducts:
    """From the kernels of a network to products across its linear channels.

    Attributes:
        products: in execution order of the kernels that read the channels.
        eps: name of a product -> ε of the batch norm in it.
        sketches: name of a product -> its description in the reference; empty for W0 itself.
    """

    products: Sequence[LinearProduct]
    eps: Mapping[str, float]
    sketches: Mapping[str, ProductSketch]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of W0's products by name."""
        return {product.name: product.shape for product in self.products}

    @property
    def vector_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the batch norms' values in products, by name, with W0's number of channels."""
        return {name: (product.channels,) for product in self.products for name in product.vectors}

    def forms(self, product: LinearProduct, tensors: Weights) -> list[Tensor]:
        """Return a suspect's product with the batch norm's values in its file, and without them.

        Args:
            product: one of the products.
            tensors: kernels, γ and variances by name; the channels can be more or fewer than W0's.

        Returns:
            Both forms, or one if the file has no such values; none if a kernel is missing or does not fit.
            They have the type of the kernels.
        """
        reading, writing = (tensors.get(name) for name in product.weights)
        if reading is None or writing is None or reading.shape[1] != len(writing):
            return []
        factors = self._factors(product, tensors, len(writing))
        rows = _computed(writing).flatten(1)
        forms = [rows] if factors is None else [rows * factors.to(rows)[:, None], rows]
        if factors is None or bool((factors == factors.flatten()[0]).all()) or _is_trained(reading):
            forms = forms[:1]
        return [rounded(_multiplied(_computed(reading), form, product), reading.dtype) for form in forms]

    def _factors(self, product: LinearProduct, tensors: Weights, rows: int) -> Tensor | None:
        """Return γ/√(variance + ε) of the rows that write the channels; None if the file has neither."""
        gamma, variance = (
            vector if vector is not None and len(vector) == rows else None
            for vector in map(tensors.get, product.vectors)
        )
        if variance is None:
            return None if gamma is None else gamma.double()
        factors = (variance.double().clamp(min=0) + self.eps[product.name]).rsqrt()
        return factors if gamma is None else gamma.double() * factors

    def apply(self, tensors: Weights, exceptions: Collection[str] = ()) -> dict[str, Tensor]:
        """Replace kernels by their products.

        Of the forms of a product with W0's shape the one counts whose rows are most similar to W0's. In
        training it is the form with the values of the batch norm.

        Args:
            tensors: kernels, γ and variances by name.
            exceptions: names of kernels and γ that are read as well.
        """
        products = {product.name: product for product in self.products}
        chosen = {
            name: self._chosen(products[name], forms) for name, forms in self.all_forms(tensors).items()
        }
        return {**self.without_parts(tensors, exceptions), **chosen}

    def without_norms(self, tensors: Weights) -> set[str]:
        """Return the names of products for whose batch norm the tensors have no values."""
        return {p.name for p in self.products if not any(name in tensors for name in p.vectors)}

    def single_kernels(self, tensors: Weights) -> dict[str, tuple[Tensor, Tensor]]:
        """Return both kernels of every product whose reader has one position, as float64 matrices.

        They are the reader [O, d] and the writer [d, I·positions].
        """
        pairs = {}
        for product in self.products:
            reading, writing = (tensors.get(name) for name in product.weights)
            if reading is None or writing is None or reading.shape[1] != len(writing):
                continue
            if reading[0, 0].numel() == 1:
                pairs[product.name] = (reading.double().flatten(1), writing.double().flatten(1))
        return pairs

    def all_forms(self, tensors: Weights) -> dict[str, list[Tensor]]:
        """Return the forms of every product that has some, by its name; see `forms`."""
        forms = {product.name: self.forms(product, tensors) for product in self.products}
        return {name: own for name, own in forms.items() if own}

    def without_parts(self, tensors: Weights, exceptions: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors that are in no product, and those of some names."""
        used = {name for product in self.products for name in (*product.weights, *product.vectors)}
        return {name: tensor for name, tensor in tensors.items() if name in exceptions or name not in used}

    def _chosen(self, product: LinearProduct, forms: Sequence[Tensor]) -> Tensor:
        first, expected = forms[0], self.sketches.get(product.name)
        if len(forms) == 1 or expected is None or tuple(first.shape) != product.shape:
            return first
        free_signs = product.reader_norm is not None
        with torch.no_grad():
            values = [_similarity(form, expected, free_signs=free_signs) for form in forms]
        return first if values[0] >= values[1] else forms[1]


def _multiplied(outer: Tensor, rows: Tensor, product: LinearProduct) -> Tensor:
    """Return the product of a kernel [O, d, ...] and the flattened rows of another one, [d, I·window]."""
    if outer[0, 0].numel() > 1:
        result = torch.einsum("odp,di->oip", outer.flatten(2), rows)
    else:
        result = outer.flatten(1) @ rows
    return result.reshape(len(outer), -1, *product.shape[2:])


def _similarity(kernel: Tensor, expected: ProductSketch, *, free_signs: bool) -> float:
    """Return the mean cosine of the sketches of a kernel's rows and W0's, with W0's column norms."""
    squares = squared_block_norms(kernel)
    multipliers = column_multipliers(squares, expected.columns.to(kernel.device))[0]
    scaled = kernel.double().flatten(2) * multipliers.sqrt()[:, None]
    matrix = torch.from_numpy(projection_matrix(scaled[0].numel(), expected.sketch.shape[1]).copy())
    rows = scaled.flatten(1).cpu() @ matrix
    cosines = torch.nn.functional.cosine_similarity(rows, expected.sketch, dim=1)
    return float((cosines.abs() if free_signs else cosines).mean())


def _computed(kernel: Tensor) -> Tensor:
    """Return a kernel in the precision of its products: float64, but in training its own."""
    return kernel if _is_trained(kernel) else kernel.double()


def _is_trained(kernel: Tensor) -> bool:
    return kernel.requires_grad and torch.is_grad_enabled()
