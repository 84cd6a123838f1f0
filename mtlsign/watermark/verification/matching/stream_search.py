"""Base of a search for the matrices of one stage of a transformer: its coordinates, and the chosen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from mtlsign.models.residual_stream import ResidualStream
from mtlsign.models.stream_stages import StreamStage
from mtlsign.models.unnamed_tensors import FileTensor
from mtlsign.models.untrusted import MAX_GROWTH
from mtlsign.watermark.verification.alignment import TransformerAligner
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.matching.candidates import Work
from mtlsign.watermark.verification.matching.stream_sources import MATRIX_SPEED
from mtlsign.watermark.verification.sketches import projection_matrix

#: Most vectors of a file that are tried as gains; with more of them, no gain is read.
MAX_GAINS = 256
#: Least multiplications for one matrix.
_MATRIX_WORK = 2**13


@dataclass
class StreamSearch:
    """Search for the tensors of one stage in one file.

    Attributes:
        aligner: alignment with W0, or its control with random sketches.
        shapes: of the network's tensors.
        stage: part of the stream whose matrices are searched.
        coordinates: sources that give its coordinates, as `StreamFrame.turn` reads them.
        tensors: of the file; matrices have W0's axes.
        work: limit of the multiplications.
        chosen: tensors by the network's names; the search adds to them.
        used: places of the chosen ones.
    """

    aligner: TransformerAligner
    shapes: Mapping[str, tuple[int, ...]]
    stage: StreamStage
    coordinates: Mapping[str, Tensor]
    tensors: Sequence[FileTensor]
    work: Work
    chosen: dict[str, Tensor]
    used: set[int]

    @property
    def _stream(self) -> ResidualStream:
        return self.aligner.products.stream

    def _choose(self, name: str, place: int, values: Tensor) -> None:
        self.chosen[name] = values
        self.used.add(place)

    @cached_property
    def turn(self) -> Floats:
        """Matrix R with W = W'·R for readers of the stage, [d, d]."""
        size = self.stage.size
        self.work.use(60 * size**3 // MATRIX_SPEED)
        turn = self.aligner.frame.turn(self.stage, self.coordinates)
        return np.eye(size) if turn is None else turn.numpy()

    def _projection(self, size: int) -> Floats:
        """Return R·S for sketches of a size, [d, s]; with stages less the mean of its rows."""
        projection = np.asarray(self.turn @ projection_matrix(self.stage.size, size))
        stream = self._stream
        return projection - projection.mean(0) if stream.stages and stream.subtracts_mean else projection

    def _free(self, name: str, axis: int) -> list[FileTensor]:
        """Return the matrices not in use that differ from a tensor's shape at most in one axis.

        It is up to `MAX_GROWTH` times as long as W0's.
        """
        shape = self.shapes[name]
        most, other = MAX_GROWTH * shape[axis], shape[1 - axis]
        return [
            t
            for t in self.tensors
            if t.place not in self.used
            and t.values.dim() == 2
            and t.values.shape[1 - axis] == other
            and t.values.shape[axis] <= most
        ]

    def _written(self, matrix: Tensor, rows: Indices | slice) -> Floats:
        """Return rows, in W0's coordinates, of a matrix that writes the stream."""
        values = matrix.double()
        if self._stream.subtracts_mean:
            values = values - values.mean(0, keepdim=True)
        return np.asarray(self.turn.T[rows] @ values.numpy())

    def _use(self, tensors: Sequence[FileTensor], times: int) -> None:
        """Subtract the work for products of each tensor with so many columns or rows."""
        self.work.use(sum(_MATRIX_WORK + times * t.values.numel() // MATRIX_SPEED for t in tensors))
