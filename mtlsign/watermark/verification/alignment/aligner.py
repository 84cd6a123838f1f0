"""Alignment of one architecture and reference: starts of the search, and its result."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mtlsign.models.channel_sets import channel_structure, without_rows
from mtlsign.watermark.verification.alignment.assignment import best_assignment, quantized
from mtlsign.watermark.verification.alignment.extra_channels import without_extra_channels
from mtlsign.watermark.verification.alignment.inputs import SQUARES, signed_permutations, squares_for
from mtlsign.watermark.verification.alignment.layers import (
    reference_layers,
)
from mtlsign.watermark.verification.alignment.linear_channels import (
    LinearSet,
    UnmixedSearch,
    linear_sets,
)
from mtlsign.watermark.verification.alignment.orders import Orders, staying_similarities
from mtlsign.watermark.verification.alignment.result import (
    RECOGNITION_MARGIN,
    SURE_COSINE,
    Alignment,
    Descent,
    with_random_sketches,
)
from mtlsign.watermark.verification.alignment.search import Search
from mtlsign.watermark.verification.alignment.suspect import SuspectLayer, suspect_layers
from mtlsign.watermark.verification.reference import Reference

#: Starts from the first layer's rows, and those that are followed to the end.
_STARTS, _FINALISTS = 4, 2
_FIRST_ROUNDS, _ROUNDS = 2, 12
#: Layers from which the symmetry of the inputs is read in the suspect's own order.
_TURNED_LAYERS = 4
#: Mean cosine from which the suspect's own order is taken without further starts.
_CLEAR = 0.8


class Aligner:
    """Alignment of suspects with the W0 of one reference.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names; layers up to the last one are aligned.
        reference: W0's reference.
        sample: float32 [n, C, H, W] of the network's input geometry.
        ordered_kernels: kernels whose rows have W0's order already; the channels of such rows stay.

    Attributes:
        layers: W0's layers by name of the kernel.
        further_names: tensors that are read besides kernels; none.
        further_shapes: shapes of those that no read-out reads; none.
        sets: channel sets of the architecture.
        input_channels: number of channels of the inputs.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """

    further_names: Sequence[str] = ()
    further_shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(
        self,
        template_model: nn.Module,
        taps: Sequence[str],
        reference: Reference,
        sample: Tensor,
        *,
        ordered_kernels: Collection[str] = (),
    ) -> None:
        structure = without_rows(channel_structure(template_model, taps, sample), ordered_kernels)
        self.sets = structure.sets
        self.layers = reference_layers(template_model, taps, sample, reference, structure)
        self.input_channels = sample.shape[1]
        self._staying = staying_similarities(self.layers.values(), self.sets)

    @property
    def resizable_names(self) -> set[str]:
        """Tensors that may have other sizes in a suspect."""
        return set(self.layers)

    def renumbered(self, tensors: Mapping[str, Tensor], select: object) -> Sequence[Mapping[str, Tensor]]:
        """Return no views: only blocks of transformers get other numbers."""
        return ()

    def align(self, kernels: Mapping[str, Tensor]) -> Alignment:
        """Bring a suspect's kernels into W0's order.

        Args:
            kernels: by name. Those without a sketch are returned unchanged. Kernels whose channels do not
                fit the others are left out.
        """
        suspect = self._suspect(kernels)
        others = {name: kernel for name, kernel in kernels.items() if name not in self.layers}
        if not suspect:
            return Alignment(others, 0.0)
        search = self._best(suspect)
        aligned = _aligned(search, suspect)
        similarities = {name: search.layer_similarity(part) for name, part in suspect.items()}
        return Alignment({**others, **aligned}, search.similarity(), similarities)

    def _suspect(self, kernels: Mapping[str, Tensor]) -> dict[str, SuspectLayer]:
        """Return the layers of a suspect without extra channels."""
        arrays = {
            name: kernel.detach().cpu().double().numpy()
            for name, kernel in kernels.items()
            if name in self.layers
        }
        suspect = suspect_layers(arrays, self.layers, self.sets)
        return without_extra_channels(suspect, self.layers, self.sets)

    def recognizes(self, kernels: Mapping[str, Tensor]) -> bool:
        """Return whether a suspect descends from W0, as far as its kernels show."""
        return self.descent(kernels, self.align(kernels)).recognized

    def descent(self, kernels: Mapping[str, Tensor], alignment: Alignment) -> Descent:
        """Compare an alignment with the same one for random kernels of W0's shapes.

        The latter gives the similarities that search alone reaches.

        Args:
            kernels: of a suspect, by name.
            alignment: their alignment.
        """
        similarities = alignment.layer_similarities
        complete = kernels.keys() & self.layers.keys() == similarities.keys()
        if complete and min(similarities.values(), default=0.0) > SURE_COSINE:
            return Descent(recognized=True, every_layer=True)
        chance = self.control().align(kernels)
        recognized = alignment.similarity > chance.similarity + RECOGNITION_MARGIN
        every_layer = complete and all(
            value > chance.layer_similarities[name] + RECOGNITION_MARGIN
            for name, value in similarities.items()
        )
        return Descent(recognized, recognized and every_layer)

    def control(self) -> Aligner:
        """Return the same alignment with random sketches, which shows what search alone reaches."""
        control = copy.copy(self)
        control.layers = with_random_sketches(self.layers)
        return control

    def without_mixes(
        self, kernels: Mapping[str, Tensor], alignment: Alignment
    ) -> Mapping[str, Tensor] | None:
        """Undo mixes of linear channels, such as those of inverted residual blocks.

        Args:
            kernels: of a suspect, by name.
            alignment: their alignment, which undoes no mix.

        Returns:
            Kernels in W0's order; None if a mix does not explain the sketches clearly better than the
            alignment. What was fitted never counts for the recognition of descendants.
        """
        suspect = self._suspect(kernels)
        mixed = linear_sets(suspect, self.sets)
        similarities = alignment.layer_similarities
        if min((similarities[name] for own in mixed for name in own.kernels), default=1.0) > SURE_COSINE:
            return None
        try:
            layers, search = self._unmixed(suspect, mixed)
            chosen = [own for own in mixed if _gain(own, layers, search, similarities) > RECOGNITION_MARGIN]
            if 0 < len(chosen) < len(mixed):  # estimates of mixes that are none would only lose accuracy
                layers, search = self._unmixed(suspect, chosen)
        except np.linalg.LinAlgError:
            return None
        others = {name: kernel for name, kernel in kernels.items() if name not in self.layers}
        aligned = _aligned(search, layers)
        useful = chosen and all(bool(kernel.isfinite().all()) for kernel in aligned.values())
        return {**others, **aligned} if useful else None

    def _unmixed(
        self, suspect: Mapping[str, SuspectLayer], mixed: Sequence[LinearSet]
    ) -> tuple[Mapping[str, SuspectLayer], Search]:
        """Return the layers without mixes and their search, the better one of two starts."""
        unmixed = UnmixedSearch(suspect, self.sets, mixed, self._search)
        free = self._best(unmixed.unchanged, [0.0] * len(self.sets)).orders
        starts = [order for order in (self._own_order(suspect), replace(free, prefers_own=False)) if order]
        results = [unmixed.run(start) for start in starts]
        return max(results, key=lambda result: float(quantized(np.array(result[1].similarity()))))

    def _search(
        self,
        suspect: Mapping[str, SuspectLayer],
        orders: Orders,
        staying: Sequence[float] | None = None,
    ) -> Search:
        return Search(suspect, self.sets, self._staying if staying is None else staying, orders)

    def _best(self, suspect: Mapping[str, SuspectLayer], staying: Sequence[float] | None = None) -> Search:
        """Return the search with the largest total similarity, or the first one that is clear."""
        starts = self.starts(suspect)
        own = self._own_order(suspect)
        if own is not None:
            # The own order comes first only if it is nearly right, because each start costs time.
            first = self._search(suspect, own).similarity() > _CLEAR
            starts.insert(0 if first else len(starts), own)
        searches = []
        for orders in starts or [Orders(SQUARES[0], np.eye(self.input_channels))]:
            search = self._search(suspect, orders, staying)
            settled = search.run(_FIRST_ROUNDS)
            if search.similarity() > _CLEAR:
                if not settled:
                    search.run(_ROUNDS)
                return search
            searches.append(search)
        searches.sort(key=lambda search: -float(quantized(np.array(search.orders.value))))
        for search in searches[:_FINALISTS]:
            search.run(_ROUNDS)
        return max(searches[:_FINALISTS], key=lambda search: float(quantized(np.array(search.orders.value))))

    def _own_order(self, suspect: Mapping[str, SuspectLayer]) -> Orders | None:
        """Return the suspect's own order under the best symmetry; None if it has other sizes than W0."""
        parts = list(suspect.values())
        if any(part.kernel.shape[0] != part.layer.shape[0] for part in parts) or any(
            part.kernel.size != np.prod(part.layer.shape) for part in parts
        ):
            return None
        channels = {number: np.arange(members.size) for number, members in enumerate(self.sets)}
        inner = [part for part in parts if not part.layer.reads_inputs and part.layer.positions > 1]
        inner = inner[:_TURNED_LAYERS]
        first = [part for part in parts if part.layer.reads_inputs]

        def value(orders: Orders, chosen: Sequence[SuspectLayer]) -> float:
            search = self._search(suspect, orders)
            return float(quantized(np.array(search.similarity(chosen))))

        windows = [part.layer.window for part in parts]
        identity = np.eye(self.input_channels)
        square = max(squares_for(windows), key=lambda s: value(Orders(s, identity, channels), inner or first))
        mixes = [identity]
        if first:
            mixes = signed_permutations(self.input_channels, free_signs=first[0].layer.free_signs)
        mix = max(mixes, key=lambda m: value(Orders(square, m, channels), first))
        return Orders(square, mix, dict(channels), prefers_own=True)

    def starts(self, suspect: Mapping[str, SuspectLayer]) -> list[Orders]:
        """Return the most promising orders of the first layer's rows."""
        part = next((p for p in suspect.values() if p.layer.reads_inputs), None)
        if part is None or len(part.layer.sets_of_rows()) != 1:
            return []
        number = part.layer.sets_of_rows()[0]
        starts = []
        for square in squares_for([p.layer.window for p in suspect.values()]):
            for mix in signed_permutations(self.input_channels, free_signs=part.layer.free_signs):
                orders = Orders(square, mix)
                search = self._search({part.layer.weight: part}, orders)
                similarity = search.row_similarity(part, number)
                order = best_assignment(similarity)
                known = order >= 0
                orders.value = float(quantized(similarity[np.flatnonzero(known), order[known]].sum()))
                orders.channels = {number: order}
                starts.append(orders)
        starts.sort(key=lambda orders: -orders.value)
        return starts[:_STARTS]


def _aligned(search: Search, layers: Mapping[str, SuspectLayer]) -> dict[str, Tensor]:
    """Return the kernels of a search in W0's order."""
    return {
        name: torch.from_numpy(search.aligned_kernel(part).reshape(part.layer.shape)).float()
        for name, part in layers.items()
    }


def _gain(
    mixed: LinearSet,
    layers: Mapping[str, SuspectLayer],
    search: Search,
    similarities: Mapping[str, float],
) -> float:
    """Return by how much the kernels of a set are more similar to W0's without its mix, on average."""
    gains = [search.layer_similarity(layers[name]) - similarities[name] for name in mixed.kernels]
    return float(np.mean(gains))
