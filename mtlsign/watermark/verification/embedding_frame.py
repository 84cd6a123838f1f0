"""Frame of word vectors: layers after an embedding, independent of the coordinates of its vectors.

Word vectors E and a layer W that reads them can be replaced by E·A and W·A⁻ᵀ for every invertible A, and by
E + v with another bias. Neither changes the network. The products of W with the vectors of known words
remain. From them and W0's vectors of these words follows W in W0's coordinates:

    W·Eᵀ·P, with P = E0·(E0ᵀ·E0)⁻¹ and both E less their mean over the words.

If the first vectors of a suspect do not fit those of W0, the words are looked for in its whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlsign.models.recurrent_layers import is_recurrent, weight_place
from mtlsign.models.taps import tapped_layers
from mtlsign.watermark.verification.model import Weights, rounded
from mtlsign.watermark.verification.vocabulary import VocabularyAxes, find_words

#: Ids whose vectors are in the reference: padding, the unknown word and the most frequent words.
MAX_ROWS = 1026
#: Singular values below this share of the largest one are no direction of the vectors.
_SMALLEST = 1e-6
#: Misfit of the first words up to which they count as W0's.
_FITTING = 0.5


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
    """Return the reference's tensors of word vectors; none without an embedding.

    They are `E/rows` float16 [r, d], and those of `VocabularyAxes`: `E/mean` float32 [d] and `E/axes`
    float32 [d, k].

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
    return vocabulary_tensors(name, vectors.detach().cpu())


def vocabulary_tensors(name: str, vectors: Tensor) -> dict[str, Tensor]:
    """Return the reference's tensors of one embedding, [V, d]; see `embedding_rows`."""
    vocabulary = VocabularyAxes.of(vectors)
    return {
        f"{name}/rows": vectors[:MAX_ROWS].half().clone(),
        f"{name}/mean": vocabulary.mean.float(),
        f"{name}/axes": vocabulary.axes.float().contiguous(),
    }


@dataclass(frozen=True)
class KnownWords:
    """W0's vectors of the first words, which are found again in a vocabulary of another order.

    Attributes:
        vectors: the vectors less their mean, float64 [r, d].
        coordinates: of these words, see `VocabularyAxes`, float64 [r, k].
    """

    vectors: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, rows: Tensor, mean: Tensor, axes: Tensor) -> KnownWords:
        """Return the known words of a reference's `E/rows`, `E/mean` and `E/axes`."""
        words = rows.double()
        return cls(words - words.mean(0), VocabularyAxes(mean.double(), axes.double()).coordinates(words))

    def find(self, vectors: Tensor) -> Tensor:
        """Return a suspect's vectors of the known words, float64 [r, d].

        Args:
            vectors: the suspect's vocabulary, [V, d] with V of at least r.
        """
        first = vectors[: len(self.vectors)].double()
        if self.misfit(first) <= _FITTING:
            return first
        rows = find_words(self.coordinates, vectors.detach().cpu())
        if rows is None:
            return first
        candidates = vectors[rows.to(vectors.device)].double()
        return candidates if self.misfit(candidates) < self.misfit(first) else first

    @torch.no_grad()
    def misfit(self, words: Tensor) -> float:
        """Return the share of W0's vectors that no linear map of the given ones explains."""
        centred, expected = words - words.mean(0), self.vectors.to(words.device)
        if centred.shape == expected.shape and torch.allclose(centred, expected, rtol=1e-2, atol=1e-3):
            return 0.0
        residual = expected - centred @ (torch.linalg.pinv(centred, rtol=_SMALLEST) @ expected)
        return float(residual.square().sum() / expected.square().sum().clamp(min=1e-300))


@dataclass(frozen=True)
class EmbeddingFrame:
    """Frame of the word vectors of one architecture and reference.

    Attributes:
        weight: name of the embedding's matrix [V, d].
        shape: of this matrix in the network.
        readers: names of the matrices [out, d] that are multiplied with word vectors.
        words: W0's vectors of the first words.
        inverse: P, float64 [r, d].
    """

    weight: str
    shape: tuple[int, ...]
    readers: tuple[str, ...]
    words: KnownWords
    inverse: Tensor

    def change(self, vectors: Tensor) -> Tensor:
        """Return the matrix that brings readers into W0's coordinates, float64 [d', d].

        Args:
            vectors: the suspect's vocabulary, [V, d'] with V of at least r.
        """
        words = self.words.find(vectors)
        return (words - words.mean(0)).T @ self.inverse.to(words.device)

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
        change = self.change(vectors)
        framed = {
            name: rounded(kernels[name].double() @ change, kernels[name].dtype)
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
    mean, axes = tensors.get(f"{name}/mean"), tensors.get(f"{name}/axes")
    if mean is None or axes is None or mean.shape != (dimensions,) or axes.shape[:1] != (dimensions,):
        return None
    words = KnownWords.of(rows, mean, axes)
    inverse = torch.linalg.pinv(words.vectors, rtol=_SMALLEST).T.contiguous()
    return EmbeddingFrame(f"{name}.weight", (count, dimensions), readers, words, inverse)


def _reads_vectors(model: nn.Module, owner: str, weight: str, dimensions: int) -> bool:
    """Return whether a matrix is the input matrix of a first recurrent layer for vectors of this size."""
    module = model.get_submodule(owner)
    if not is_recurrent(module) or module.input_size != dimensions:
        return False
    place = weight_place(weight.rpartition(".")[2])
    return place.layer == 0 and not place.reads_outputs
