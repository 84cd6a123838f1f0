"""Matcher of a file's tensors to the layers of one reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from mtlsign.models.unnamed_tensors import FileTensor, file_tensors, match_by_order
from mtlsign.watermark.verification.alignment import Aligner, RecurrentAligner, TransformerAligner
from mtlsign.watermark.verification.alignment.assignment import RESOLUTION
from mtlsign.watermark.verification.alignment.inputs import SQUARES, squares_for
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer
from mtlsign.watermark.verification.alignment.orders import Orders
from mtlsign.watermark.verification.alignment.result import RECOGNITION_MARGIN, mean_similarity
from mtlsign.watermark.verification.alignment.suspect import suspect_layers
from mtlsign.watermark.verification.matching.candidates import Candidate, Slot
from mtlsign.watermark.verification.matching.recurrent_search import RecurrentSearch, find_embedding
from mtlsign.watermark.verification.matching.sketch_search import (
    CLEAR,
    Assigned,
    Match,
    WorkLimit,
    accept,
    ranked,
    search,
)
from mtlsign.watermark.verification.matching.staged_search import search_transformer
from mtlsign.watermark.verification.matching.stream_sources import find_sources

#: Kernels for the first layer that are tried under all symmetries of the inputs, and those followed further.
_FIRST_CANDIDATES, _FOLLOWED = 16, 2


@dataclass(frozen=True)
class ContentView:
    """Tensors of a file under the names of a network.

    Attributes:
        tensors: by the network's names; kernels can have other sizes than W0's.
        has_own_order: whether they can be read in their own order; kernels found by sketches cannot, because
            no batch norm shows the signs of their rows.
    """

    tensors: Mapping[str, Tensor]
    has_own_order: bool


class ContentMatcher:
    """Matcher of a file's tensors to the layers of one reference, without their names.

    Args:
        template_model: the architecture; its own values are never used.
        aligner: alignment with the reference.
    """

    def __init__(
        self, template_model: nn.Module, aligner: Aligner | RecurrentAligner | TransformerAligner
    ) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in template_model.state_dict().items()}
        self.aligner = aligner

    def views(self, tensors: Mapping[str, Tensor], *, with_products: bool = True) -> list[ContentView]:
        """Return the network's tensors as the file may hold them: by order, and by sketches.

        Args:
            tensors: the file, of any origin.
            with_products: whether two tensors may be the factors of one kernel.

        Raises:
            ModelError: the file is too large to be matched.
        """
        files = file_tensors(tensors)
        views = [ContentView(match_by_order(self._shapes, files), has_own_order=True)]
        if isinstance(self.aligner, Aligner):
            views.append(
                ContentView(self._by_sketches(self.aligner, files, with_products), has_own_order=False)
            )
        elif self.aligner.layers:
            views.append(ContentView(self._by_layers(self.aligner, files), has_own_order=False))
        return [view for view in views if view.tensors]

    def _by_layers(
        self, aligner: RecurrentAligner | TransformerAligner, tensors: Sequence[FileTensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of a transformer or recurrent network; none if it is not recognised.

        The matrices of the file have their axes in one of both orders. The same search for random sketches
        gives the similarity by chance. A layer that is not in the file has the similarity 0, but does not
        count by chance. Because a search chooses among many matrices, it needs a larger difference.
        """
        sources = _sources(aligner, tensors, WorkLimit())
        for files in (tensors, _transposed(tensors)):
            work = WorkLimit()
            chosen, similarities = self._searched(aligner, sources, files, work)
            similarity = sum(similarities.values()) / max(1, len(aligner.layers))
            if not aligner.exceeds(similarity, 0.0):
                continue
            _, by_chance = self._searched(aligner.control(), sources, files, work)
            if aligner.exceeds(similarity, mean_similarity(by_chance) + RECOGNITION_MARGIN):
                return chosen
        return {}

    def _searched(
        self,
        aligner: RecurrentAligner | TransformerAligner,
        sources: Mapping[str, FileTensor],
        tensors: Sequence[FileTensor],
        work: WorkLimit,
    ) -> tuple[dict[str, Tensor], Mapping[str, float]]:
        """Return the tensors that are most similar to W0's, and the similarities of their layers."""
        if isinstance(aligner, TransformerAligner):
            chosen = search_transformer(aligner, self._shapes, sources, tensors, work)
        else:
            chosen = RecurrentSearch(aligner, next(iter(sources.values()), None), tensors, work).run()
        return chosen, aligner.align(chosen).layer_similarities

    def _by_sketches(
        self, aligner: Aligner, tensors: Sequence[FileTensor], with_products: bool
    ) -> dict[str, Tensor]:
        """Return the kernels that are similar to W0's beyond chance; none if the network is not.

        The same search for random kernels of W0's shapes gives the excess by chance. The first layer does
        not count, whose candidate is chosen among many symmetries.
        """
        work = WorkLimit(with_products=with_products)
        match = self._best_match(aligner, tensors, work)
        if match.excess() <= RECOGNITION_MARGIN:
            return {}
        chance = self._best_match(aligner.control(), tensors, work).excess()
        if match.excess() <= chance + RECOGNITION_MARGIN:
            return {}
        return {name: candidate.kernel for name, candidate in match.chosen.items()}

    def _best_match(self, aligner: Aligner, tensors: Sequence[FileTensor], work: WorkLimit) -> Match:
        """Return the kernels that are most similar to W0's, under the best start."""
        layers = list(aligner.layers.values())
        best: Match | None = None
        for start in self._starts(aligner, tensors, work):
            match = search(layers, aligner.sets, tensors, start, work)
            if best is None or match.total() > best.total():
                best = match
            if best.total() > CLEAR * len(layers) and len(best.chosen) == len(layers):
                break
        assert best is not None  # there is a start
        return best

    def _starts(self, aligner: Aligner, tensors: Sequence[FileTensor], work: WorkLimit) -> Iterator[Match]:
        """Yield W0's order of all channels, and the best orders of the rows that read the inputs."""
        sizes = {number: members.size for number, members in enumerate(aligner.sets)}
        identity = np.eye(aligner.input_channels)
        channels = {number: np.arange(size) for number, size in sizes.items()}
        yield Match(Orders(SQUARES[0], identity, channels), sizes)
        first = next((layer for layer in aligner.layers.values() if layer.reads_inputs), None)
        if first is None or len(first.sets_of_rows()) != 1:
            return
        ranking = []
        candidates = _first_candidates(aligner, first, tensors, work)
        for number, candidate in enumerate(candidates):
            array = candidate.kernel.double().numpy()
            suspect = suspect_layers({first.weight: array}, {first.weight: first}, aligner.sets)
            for orders in aligner.starts(suspect)[:_FOLLOWED] if suspect else []:
                ranking.append((-orders.value, number, orders, candidate))
        ranking.sort(key=lambda entry: entry[:2])
        for value, _, orders, candidate in ranking[:_FOLLOWED]:
            match = Match(Orders(orders.square, orders.mix), {})
            cosine = -value * RESOLUTION / first.weighting / len(first.sketch)
            accept(match, first, Assigned(candidate, cosine, orders.channels, cosine), aligner.sets)
            yield match


def _first_candidates(
    aligner: Aligner, layer: ReferenceLayer, tensors: Sequence[FileTensor], work: WorkLimit
) -> list[Candidate]:
    """Return candidates for the layer that reads the inputs; the most similar ones of many."""
    slot = Slot.of(layer, aligner.sets, {})
    candidates = [*slot.candidates(tensors), *slot.products(tensors, work)]
    if len(candidates) <= _FIRST_CANDIDATES:
        return candidates
    best: dict[int, float] = {}
    for square in squares_for([layer.window]):
        start = Match(Orders(square, np.eye(aligner.input_channels)), {})
        for value, number, _, _ in ranked(slot, candidates, aligner.sets, start, work):
            best[number] = min(value, best.get(number, 0.0))
    order = sorted(best, key=lambda number: (best[number], number))
    return [candidates[number] for number in order[:_FIRST_CANDIDATES]]


def _sources(
    aligner: RecurrentAligner | TransformerAligner, tensors: Sequence[FileTensor], work: WorkLimit
) -> dict[str, FileTensor]:
    """Return the tensors that give the coordinates, whatever the axes of the matrices are."""
    if isinstance(aligner, TransformerAligner):
        return find_sources(aligner.frame, tensors, work)
    frame = aligner.frame
    embedding = None if frame is None else find_embedding(frame, tensors, work)
    return {} if frame is None or embedding is None else {frame.weight: embedding}


def _transposed(tensors: Sequence[FileTensor]) -> list[FileTensor]:
    """Return the tensors of a file with the axes of matrices exchanged."""
    return [
        FileTensor(t.name, t.place, t.values.T, (t.values.T,)) if t.values.dim() == 2 else t for t in tensors
    ]
