"""Frame of a residual stream: a transformer's matrices in the coordinates of W0's stream.

All vectors of a transformer's residual stream can be turned: token vectors, positions and patches E become
E·Rᵀ, matrices that read the stream W·Rᵀ, and those that write it R·W. With norms before the sub-layers R is
any orthogonal matrix (Ashkboos et al. 2024), otherwise a permutation. The orthogonal matrix closest to E0ᵀ·E
(Schönemann 1966) turns a suspect back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtlsign.models.residual_stream import ResidualStream, source_vectors
from mtlsign.watermark.verification.embedding_frame import MAX_ROWS, KnownWords, vocabulary_tensors
from mtlsign.watermark.verification.model import Weights, rounded

#: Share of the mean singular value that is added to keep directions without known vectors as they are.
_RIDGE = 1e-3


def stream_tensors(model: nn.Module, stream: ResidualStream) -> dict[str, Tensor]:
    """Return the reference's tensors of a stream's sources.

    They are `S/rows` float16 [r, d] for every source S, and `S/mean` and `S/axes` for the embedding of
    the tokens (`embedding_rows`).

    Args:
        model: the unmarked network W0.
        stream: its residual stream.
    """
    tensors: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for name in stream.sources:
        vectors = source_vectors(parameters[name].detach().cpu(), stream.size)
        if vectors is not None:
            tensors[f"{name}/rows"] = vectors[:MAX_ROWS].half().clone()
    words = _words_name(model, stream)
    if words is not None:
        tensors |= vocabulary_tensors(words, parameters[words].detach().cpu())
    return tensors


def _words_name(model: nn.Module, stream: ResidualStream) -> str | None:
    """Return the embedding that is used first, which is that of the tokens; None without one."""
    modules = dict(model.named_modules())
    embeddings = (n for n in stream.sources if isinstance(modules[n.rpartition(".")[0]], nn.Embedding))
    return next(embeddings, None)


@dataclass(frozen=True)
class StreamFrame:
    """Coordinates of W0's stream.

    Attributes:
        stream: residual stream of the architecture.
        rows: source -> W0's vectors, float64 [r, d].
        shapes: shapes of the sources in the network.
        words: the words of one source, which are looked for if their order differs; None without.
        words_name: name of this source.
    """

    stream: ResidualStream
    rows: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    words: KnownWords | None
    words_name: str

    @classmethod
    def of(cls, model: nn.Module, stream: ResidualStream, tensors: Mapping[str, Tensor]) -> StreamFrame:
        """Return the frame of an architecture and the tensors of a reference."""
        rows, shapes, words, words_name = {}, {}, None, ""
        parameters = dict(model.named_parameters())
        for name in stream.sources:
            known = tensors.get(f"{name}/rows")
            if known is None or known.dim() != 2 or known.shape[1] != stream.size:
                continue
            rows[name], shapes[name] = known.double(), tuple(parameters[name].shape)
            mean, axes = tensors.get(f"{name}/mean"), tensors.get(f"{name}/axes")
            if mean is None or axes is None:
                continue
            if mean.shape == (stream.size,) and axes.shape[:1] == (stream.size,):
                words, words_name = KnownWords.of(known, mean, axes), name
        return cls(stream, rows, shapes, words, words_name)

    def apply(self, matrices: Weights) -> dict[str, Tensor]:
        """Turn matrices into the coordinates of W0's stream.

        Args:
            matrices: result of `AttentionProducts.normalized`, and the sources.

        Returns:
            The matrices without sources.
        """
        result = {name: matrix for name, matrix in matrices.items() if name not in self.rows}
        turn = self._turn(matrices)
        if turn is None:
            return result
        for name, matrix in result.items():
            if name in self.stream.readers and matrix.shape[1] == len(turn):
                result[name] = rounded(matrix.double() @ turn, matrix.dtype)
            elif name in self.stream.writers and matrix.shape[0] == len(turn):
                result[name] = rounded(turn.T @ matrix.double(), matrix.dtype)
        return result

    @torch.no_grad()
    def _turn(self, matrices: Weights) -> Tensor | None:
        """Return the matrix R with W = W'·R for readers; None if nothing has to be turned."""
        pairs = []
        for name, known in self.rows.items():
            tensor = matrices.get(name)
            vectors = None if tensor is None else source_vectors(tensor, self.stream.size)
            if vectors is None or len(vectors) < len(known):
                continue
            own = vectors[: len(known)].cpu().double()
            if name == self.words_name and self.words is not None:
                own = self.words.find(vectors.cpu())
            pairs.append((self._relative(own), self._relative(known)))
        if not pairs or all(torch.allclose(own, known, rtol=1e-2, atol=1e-3) for own, known in pairs):
            return None
        product = sum((own.T @ known for own, known in pairs), torch.zeros(()).double())
        left, values, right = torch.linalg.svd(product / torch.linalg.matrix_norm(product).clamp(min=1e-300))
        ridge = _RIDGE * float(values.mean())
        scaled = left @ torch.diag(values) @ right + ridge * torch.eye(len(values), dtype=torch.float64)
        left, _, right = torch.linalg.svd(scaled)
        return torch.as_tensor(left @ right)

    def _relative(self, vectors: Tensor) -> Tensor:
        """Return vectors less the parts that a file's owner can move between sources and norms."""
        if self.stream.subtracts_mean:
            vectors = vectors - vectors.mean(1, keepdim=True)
        return vectors - vectors.mean(0) if len(vectors) > 1 else vectors
