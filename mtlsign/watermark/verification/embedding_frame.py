"""Frame of word vectors: layers after an embedding, independent of the coordinates of its vectors.

Word vectors E and a layer W that reads them can be replaced by E·A and W·A⁻ᵀ for every invertible A, and by
E + v with another bias. Neither changes the network. The products of W with the vectors of known words
remain. From them and W0's vectors of these words follows W in W0's coordinates:

    W·Eᵀ·P, with P = E0·(E0ᵀ·E0)⁻¹ and both E less their mean over the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlsign.models.recurrent_layers import is_recurrent, weight_place
from mtlsign.models.taps import tapped_layers
from mtlsign.watermark.verification.model import Weights

#: Ids whose vectors are in the reference: padding, the unknown word and the most frequent words.
MAX_ROWS = 1026
#: Singular values below this share of the largest one are no direction of the vectors.
_SMALLEST = 1e-6


def embedding_name(model: nn.Module, taps: Sequence[str], sample: Tensor) -> str | None:
    """Return the name of the only embedding that is used before the last tap; None without one."""
    modules = dict(model.named_modules())
    names = [
        layer.conv
        for layer in tapped_layers(model, taps, sample)
        if isinstance(modules[layer.conv], nn.Embedding)
    ]
    return names[0] if len(names) == 1 else None


def embedding_rows(model: nn.Module, taps: Sequence[str], sample: Tensor) -> dict[str, Tensor]:
    """Return the reference's tensor of word vectors, `E/rows` float16 [r, d]; nothing without an embedding.

    Args:
        model: the unmarked network W0.
        taps: module names.
        sample: one batch.
    """
    name = embedding_name(model, taps, sample)
    if name is None:
        return {}
    vectors = model.get_submodule(name).weight
    assert isinstance(vectors, Tensor)
    return {f"{name}/rows": vectors[:MAX_ROWS].detach().half().cpu().clone()}


@dataclass(frozen=True)
class EmbeddingFrame:
    """Frame of the word vectors of one architecture and reference.

    Attributes:
        weight: name of the embedding's matrix [V, d].
        shape: of this matrix in the network.
        readers: names of the matrices [out, d] that are multiplied with word vectors.
        inverse: P, float64 [r, d].
    """

    weight: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]
    inverse: Tensor

    def apply(self, kernels: Weights) -> dict[str, Tensor]:
        """Bring the readers into W0's coordinates, and remove the embedding.

        Args:
            kernels: by name. Without an embedding, or with one of other sizes, its readers are removed, too.

        Returns:
            Kernels in the types of the readers.
        """
        others = {n: k for n, k in kernels.items() if n != self.weight and n not in self.readers}
        vectors = kernels.get(self.weight)
        if vectors is None or vectors.dim() != 2 or len(vectors) < len(self.inverse):
            return others
        words = vectors[: len(self.inverse)].double()
        change = (words - words.mean(0)).T @ self.inverse.to(words.device)
        framed = {
            name: (kernels[name].double() @ change).to(kernels[name].dtype)
            for name in self.readers
            if name in kernels and kernels[name].shape[1] == len(change)
        }
        return {name: {**others, **framed}[name] for name in kernels if name in others or name in framed}


def embedding_frame(
    model: nn.Module, taps: Sequence[str], sample: Tensor, tensors: Mapping[str, Tensor]
) -> EmbeddingFrame | None:
    """Return the frame of an architecture; None if it has no embedding or the reference no word vectors.

    Args:
        model: the architecture; its own values are never used.
        taps: module names.
        sample: one batch.
        tensors: of the reference.
    """
    name = embedding_name(model, taps, sample)
    rows = None if name is None else tensors.get(f"{name}/rows")
    if name is None or rows is None or rows.dim() != 2:
        return None
    embedding = model.get_submodule(name)
    assert isinstance(embedding, nn.Embedding)
    count, dimensions = embedding.weight.shape
    if rows.shape != (min(count, MAX_ROWS), dimensions):
        return None
    readers = tuple(
        layer.weight
        for layer in tapped_layers(model, taps, sample)
        if _reads_vectors(model, layer.conv, layer.weight, dimensions)
    )
    words = rows.double()
    inverse = torch.linalg.pinv(words - words.mean(0), rtol=_SMALLEST).T
    return EmbeddingFrame(f"{name}.weight", (count, dimensions), readers, inverse.contiguous())


def _reads_vectors(model: nn.Module, owner: str, weight: str, dimensions: int) -> bool:
    """Return whether a matrix is the input matrix of a first recurrent layer for vectors of this size."""
    module = model.get_submodule(owner)
    if not is_recurrent(module) or module.input_size != dimensions:
        return False
    place = weight_place(weight.rpartition(".")[2])
    return place.layer == 0 and not place.reads_outputs
