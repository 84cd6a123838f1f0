"""Frame of a residual stream: a transformer's matrices in the coordinates of W0's stream.

All vectors of a transformer's residual stream can be turned: token vectors, positions and patches E become
E·Rᵀ, matrices that read the stream W·Rᵀ, and those that write it R·W. With norms before the sub-layers R is
any orthogonal matrix (Ashkboos et al. 2024), otherwise a permutation. The orthogonal matrix closest to E0ᵀ·E
(Schönemann 1966) turns a suspect back.

Each stage of a network with patch merging (Liu et al. 2021) has its turn. A matrix M between two
stages reads m vectors at once and becomes R'·M·(I ⊗ Rᵀ): it is turned back on the side of its inputs first,
and its columns then show the turn R' of the next stage. Where a norm follows the patches, its gains leave
only permutations and a common sign, which are found by an assignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.models.residual_stream import ResidualStream
from mtlsign.models.stream_stages import StreamStage
from mtlsign.watermark.verification.alignment.assignment import best_assignment
from mtlsign.watermark.verification.embedding_frame import KnownWords
from mtlsign.watermark.verification.model import Weights, rounded
from mtlsign.watermark.verification.stream_sources import stage_vectors

#: Share of the mean singular value that is added to keep directions without known vectors as they are.
_RIDGE = 1e-3


@dataclass(frozen=True)
class StreamFrame:
    """Coordinates of W0's stream.

    Attributes:
        stream: residual stream of the architecture.
        rows: source -> W0's vectors, float64 [r, d].
        shapes: shapes in the network of the sources, and of the gains that belong to them.
        words: the words of one source, which are looked for if their order differs; None without.
        words_name: name of this source.
        first_gains: gain of the norm after the first sources -> W0's values, float64 [d].
    """

    stream: ResidualStream
    rows: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    words: KnownWords | None
    words_name: str
    first_gains: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, stream: ResidualStream, tensors: Mapping[str, Tensor]) -> StreamFrame:
        """Return the frame of an architecture and the tensors of a reference."""
        rows, shapes, words, words_name = {}, {}, None, ""
        parameters = dict(model.named_parameters())
        sizes = {name: stage.size for stage in stream.parts for name in stage.sources}
        for name, size in sizes.items():
            known = tensors.get(f"{name}/rows")
            if known is None or known.dim() != 2 or known.shape[1] != size:
                continue
            rows[name], shapes[name] = known.double(), tuple(parameters[name].shape)
            mean, axes = tensors.get(f"{name}/mean"), tensors.get(f"{name}/axes")
            if mean is None or axes is None:
                continue
            if mean.shape == (size,) and axes.shape[:1] == (size,):
                words, words_name = KnownWords.of(known, mean, axes), name
        gains = {stream.gains[name] for name in stream.mergings}
        first_gains = {}
        for stage in stream.stages:
            known = tensors.get(f"={stage.first_norm}.weight")
            if known is not None and known.shape == (stage.size,):
                first_gains[f"{stage.first_norm}.weight"] = known.double()
        shapes |= {name: tuple(parameters[name].shape) for name in (*gains, *first_gains)}
        return cls(stream, rows, shapes, words, words_name, first_gains)

    def apply(self, matrices: Weights) -> dict[str, Tensor]:
        """Turn matrices into the coordinates of W0's stream.

        Args:
            matrices: result of `AttentionProducts.normalized`, and the sources.

        Returns:
            The matrices without sources and gains.
        """
        result = dict(matrices)
        for stage in self.stream.parts:
            turn = self.turn(stage, result)
            if turn is None:
                continue
            for name, matrix in result.items():
                if name in stage.readers and _reads(matrix, turn, several=name in self.stream.mergings):
                    vectors = matrix.double().reshape(-1, len(turn))
                    result[name] = rounded((vectors @ turn).reshape(matrix.shape), matrix.dtype)
                elif name in stage.writers and matrix.shape[0] == len(turn):
                    result[name] = rounded(turn.T @ matrix.double(), matrix.dtype)
        dropped = {*self.rows, *self.first_gains}
        return {name: matrix for name, matrix in result.items() if name not in dropped}

    def turn(self, stage: StreamStage, matrices: Weights) -> Tensor | None:
        """Return the matrix R with W = W'·R for readers of a stage; None if nothing has to be turned."""
        pairs = []
        for name in stage.sources:
            tensor, known = matrices.get(name), self.rows.get(name)
            vectors = None if tensor is None else stage_vectors(name, tensor, self.stream, stage.size)
            if known is None or vectors is None or len(vectors) < len(known):
                continue
            own = vectors[: len(known)].cpu().double()
            if name == self.words_name and self.words is not None:
                own = self.words.find(vectors.cpu())
            pairs.append((self.relative(own), self.relative(known)))
        if stage.first_norm is not None:
            return self._order(f"{stage.first_norm}.weight", pairs, matrices)
        if not pairs or _all_close(pairs):
            return None
        return _closest_turn(pairs)

    def _order(self, gain: str, pairs: Sequence[tuple[Tensor, Tensor]], matrices: Weights) -> Tensor | None:
        """Return the signed permutation of a stage whose sources pass a norm with this gain."""
        own_gain, known_gain = matrices.get(gain), self.first_gains.get(gain)
        order, sign = None, 1.0
        if pairs and not _all_close(pairs):
            own, known = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
            similarities = F.normalize(known, dim=0).T @ F.normalize(own, dim=0)
            order = torch.from_numpy(best_assignment(similarities.numpy()))
        if own_gain is not None and known_gain is not None and own_gain.shape == known_gain.shape:
            values = own_gain.detach().cpu().double()
            sign = -1.0 if float((values if order is None else values[order]) @ known_gain) < 0 else 1.0
            order = torch.arange(len(values)) if order is None and sign < 0 else order
        if order is None:
            return None
        turn = torch.zeros(len(order), len(order), dtype=torch.float64)
        turn[order, torch.arange(len(order))] = sign
        return turn

    def relative(self, vectors: Tensor) -> Tensor:
        """Return vectors less the parts that a file's owner can move between sources and norms."""
        if self.stream.subtracts_mean:
            vectors = vectors - vectors.mean(1, keepdim=True)
        return vectors - vectors.mean(0) if len(vectors) > 1 else vectors


def _reads(matrix: Tensor, turn: Tensor, *, several: bool) -> bool:
    """Return whether a matrix reads vectors of the turn's size, or several of them at once."""
    size, rest = divmod(matrix.shape[1], len(turn))
    return not rest and (size > 1 if several else size == 1)


def _all_close(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.allclose(own, known, rtol=1e-2, atol=1e-3) for own, known in pairs)


@torch.no_grad()
def _closest_turn(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the orthogonal matrix R with own·R nearest to known, for vectors [r, d] of each source."""
    product = sum((own.T @ known for own, known in pairs), torch.zeros(()).double())
    left, values, right = torch.linalg.svd(product / torch.linalg.matrix_norm(product).clamp(min=1e-300))
    ridge = _RIDGE * float(values.mean())
    scaled = left @ torch.diag(values) @ right + ridge * torch.eye(len(values), dtype=torch.float64)
    left, _, right = torch.linalg.svd(scaled)
    return torch.as_tensor(left @ right)
