"""Selection of the tensors that a detector reads: by name, by block and by content; its results."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.untrusted import MappedTensors, has_unread_tensors, select_tensors_untrusted
from mtlsign.watermark.verification.alignment import (
    Aligner,
    Alignment,
    Descent,
    RecurrentAligner,
    TransformerAligner,
)
from mtlsign.watermark.verification.matching import ContentMatcher

#: Sum of the similarities of layers by which a reading by content must exceed one by names.
_BETTER = 0.5


@dataclass(frozen=True)
class SuspectSelector:
    """Selector of a suspect's tensors.

    Attributes:
        aligner: alignment with W0.
        matcher: matcher of tensors without names.
        tensor_names: names of the architecture's tensors.
        shapes: name -> shape of the tensors that read-outs need.
        optional: name -> shape of tensors that are read if the file has them.
        tolerated: names of tensors that may be missing.
    """

    aligner: Aligner | RecurrentAligner | TransformerAligner
    matcher: ContentMatcher
    tensor_names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]]
    tolerated: Collection[str]

    def by_name(self, tensors: Mapping[str, Tensor]) -> Iterator[MappedTensors]:
        """Yield the tensors in each place, and then those of blocks that have other numbers than W0's."""
        yield from self._select(tensors)
        try:
            for view in self.aligner.renumbered(tensors, self._select):
                yield from self._select(view)
        except ModelError as error:
            yield MappedTensors({}, str(error))

    def by_content(
        self, tensors: Mapping[str, Tensor], *, with_products: bool
    ) -> Iterator[tuple[MappedTensors, bool]]:
        """Yield tensors that are found without names, and whether they can be read in their own order.

        Those that are not recognised as a descendant of W0 are left out, if the reference has sketches.

        Args:
            tensors: the suspect's tensors.
            with_products: whether two tensors may be the factors of one kernel.
        """
        blocks = list(self._with_other_blocks(tensors))
        yield from ((selected, False) for selected, _ in blocks)
        if any(self.descent(*entry).every_layer for entry in blocks):
            return
        try:
            views = self.matcher.views(tensors, with_products=with_products)
        except ModelError as error:
            yield MappedTensors({}, str(error)), False
            return
        for view in views:
            for selected in self._select(view.tensors):
                if selected.problem is not None:
                    continue
                needs_recognition = view.has_own_order and self.aligner.layers
                if needs_recognition and not self.descent(selected, self.align(selected)).recognized:
                    continue
                yield selected, view.has_own_order and self.has_own_order(selected.tensors)

    def exceeds_names(self, alignment: Alignment, named: float) -> bool:
        """Return whether layers found by content are more similar to W0's than under their names.

        This counts for recurrent and attention layers; there it must be by half of a layer in total.

        Args:
            alignment: of the layers that were found by content.
            named: largest sum of similarities of all layers under their names; 0 if no place has all.
        """
        if not self.aligner.layers or isinstance(self.aligner, Aligner) or not named:
            return True
        return sum(alignment.layer_similarities.values()) > named + _BETTER

    def _with_other_blocks(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[MappedTensors, Alignment]]:
        """Yield the tensors in each place with exchanged numbers of blocks, if these are recognised.

        The numbers are looked for with random sketches as well, to know what this reaches by chance.
        """
        aligner = self.aligner
        if not isinstance(aligner, TransformerAligner) or not aligner.layers:
            return
        control = self._exchanged_blocks(aligner.control(), tensors)
        chance = max((alignment.similarity for _, alignment in control), default=0.0)
        for selected, alignment in self._exchanged_blocks(aligner, tensors):
            if aligner.exceeds(alignment.similarity, chance):
                yield selected, alignment

    def _exchanged_blocks(
        self, aligner: TransformerAligner, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[MappedTensors, Alignment]]:
        """Yield the tensors with the numbers of W0's most similar blocks, and their alignment."""
        try:
            for view in aligner.renumbered(tensors, self._select, own_numbers=True):
                for selected in self._select(view):
                    if selected.problem is None:
                        yield selected, aligner.align(self.alignable(selected.tensors))
        except ModelError:  # so many places are a problem of the readings by name already
            return

    def align(self, selected: MappedTensors) -> Alignment:
        """Bring selected kernels into W0's order; other tensors are not read."""
        return self.aligner.align(self.alignable(selected.tensors))

    def descent(self, selected: MappedTensors, alignment: Alignment) -> Descent:
        """Return whether selected kernels descend from W0, all of them and each under its name.

        Names show nothing by themselves: an attacker can exchange them among tensors of equal shapes. Without
        sketches nothing is recognised.
        """
        if not self.aligner.layers:
            return Descent(recognized=False, every_layer=False)
        return self.aligner.descent(self.alignable(selected.tensors), alignment)

    def orders(
        self,
        selected: MappedTensors,
        alignment: Alignment,
        own: Mapping[str, Tensor] | None,
        required: Collection[str],
    ) -> Iterator[KernelOrder]:
        """Yield the kernels in the suspect's own order, aligned with W0, and without mixes, if these differ.

        Args:
            selected: the tensors in one place.
            alignment: of these tensors.
            own: the kernels in the suspect's own order; None if they cannot be read so.
            required: kernels that may not be missing.
        """
        if own is not None:
            yield KernelOrder(own, alignment.similarity)
        if own is None or not equal_kernels(own, alignment.kernels):
            unfit = sorted(set(required) - alignment.kernels.keys())
            if unfit or not alignment.kernels:
                name = unfit[0] if unfit else "all kernels"
                yield KernelOrder({}, 0.0, f"the sizes of {name!r} and of the other kernels do not fit")
            else:
                yield KernelOrder(alignment.kernels, alignment.similarity)
        if isinstance(self.aligner, Aligner):
            unmixed = self.aligner.without_mixes(self.alignable(selected.tensors), alignment)
            if unmixed is not None:
                yield KernelOrder(unmixed, alignment.similarity)

    def has_unread(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether a matrix or kernel of the file has no name of the architecture."""
        return has_unread_tensors(self.tensor_names, tensors)

    def alignable(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that an alignment reads: the matrices, and vectors of the inputs."""
        names = {*self.shapes, *self.aligner.further_names}
        return {name: tensor for name, tensor in tensors.items() if name in names}

    def has_own_order(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether all tensors have W0's shapes, so that they can be read without alignment."""
        expected = {**self.optional, **self.shapes}
        return all(tuple(t.shape) == expected.get(name, t.shape) for name, t in tensors.items())

    def _select(self, tensors: Mapping[str, Tensor]) -> Iterator[MappedTensors]:
        """Select the tensors for each place where a file has them under their names."""
        return select_tensors_untrusted(
            dict(self.shapes),
            tensors,
            optional={**self.optional, **self.aligner.further_shapes},
            tolerated=self.tolerated,
            resizable=self.aligner.resizable_names,
        )


@dataclass(frozen=True)
class SuspectReading:
    """All that is independent of the key, of the kernels in one place of a suspect's file.

    Attributes:
        values: one value for each read-out; empty if there is a problem.
        problem: reason why the kernels cannot be read, or None.
        missing: kernels that are missing or damaged.
        similarity: how alike the aligned kernels and those of W0 are, see `Alignment`.
        recognized: whether the kernels are recognised as those of a descendant of W0.
        by_content: whether the kernels were found without their names.
    """

    values: tuple[Any, ...]
    problem: str | None
    missing: tuple[str, ...] = ()
    similarity: float = 0.0
    recognized: bool = False
    by_content: bool = False

    def description(self) -> dict[str, Any]:
        """Return the fields of a `ScoreResult` that describe the reading."""
        names = ("missing", "similarity", "recognized", "by_content")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class KernelOrder:
    """Kernels of a suspect in one order of their channels.

    Attributes:
        kernels: with W0's shapes and signs.
        similarity: how alike the aligned kernels and those of W0 are.
        problem: reason why the kernels cannot be read, or None.
    """

    kernels: Mapping[str, Tensor]
    similarity: float
    problem: str | None = None


def equal_kernels(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of kernels are equal; a sign of zero does not matter."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class EarlierKernels:
    """Kernels that were read already; a sign of zero does not distinguish them."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, kernels: Mapping[str, Tensor]) -> bool:
        """Remember kernels; return whether they are new."""
        digest = hashlib.sha256()
        for name in sorted(kernels):
            values = (kernels[name].detach().cpu().contiguous() + 0.0).numpy()
            digest.update(f"{name}{values.shape}".encode())
            digest.update(values.tobytes())
        known = digest.digest() in self._digests
        self._digests.add(digest.digest())
        return not known
