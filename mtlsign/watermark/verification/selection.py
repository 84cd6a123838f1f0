"""Selection of the tensors that a detector reads: by name, by block and by content; its results."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.untrusted import MappedTensors, has_unread_tensors, select_tensors_untrusted
from mtlsign.watermark.verification.alignment import (
    Aligner,
    RecurrentAligner,
    TransformerAligner,
)
from mtlsign.watermark.verification.matching import ContentMatcher


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

    def by_content(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[MappedTensors, bool]]:
        """Yield tensors that are found without names, and whether they can be read in their own order.

        Those that are not recognised as a descendant of W0 are left out, if the reference has sketches.
        """
        blocks = list(self._with_other_blocks(tensors))
        yield from ((selected, False) for selected in blocks)
        if any(map(self._recognizes_each, blocks)):
            return
        try:
            views = self.matcher.views(tensors)
        except ModelError as error:
            yield MappedTensors({}, str(error)), False
            return
        for view in views:
            for selected in self._select(view.tensors):
                if selected.problem is not None:
                    continue
                if view.has_own_order and self.aligner.layers and not self._recognizes([selected]):
                    continue
                yield selected, view.has_own_order and self.has_own_order(selected.tensors)

    def needs_content(self, tensors: Mapping[str, Tensor], *, complete: bool) -> bool:
        """Return whether the names of a file leave open which tensors are those of the network.

        Args:
            tensors: the suspect's tensors.
            complete: whether the file has all of them in one place, under their names.
        """
        if not complete:
            return True
        if isinstance(self.aligner, RecurrentAligner | TransformerAligner) and self.aligner.layers:
            return not any(map(self._recognizes_each, self.by_name(tensors)))
        return self.has_unread(tensors) and not self._recognizes(self.by_name(tensors))

    def has_unread(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether a matrix or kernel of the file has no name of the architecture."""
        return has_unread_tensors(self.tensor_names, tensors)

    def recognizes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether the kernels descend from W0, by name or by content."""
        if self._recognizes(self.by_name(tensors)):
            return True
        return any(selected.problem is None for selected, _ in self.by_content(tensors))

    def _recognizes(self, selections: Iterable[MappedTensors]) -> bool:
        return any(
            selected.problem is None and self.aligner.recognizes(self.alignable(selected.tensors))
            for selected in selections
        )

    def _recognizes_each(self, selected: MappedTensors) -> bool:
        """Return whether each layer descends from W0's; for recurrent layers and attention layers."""
        assert isinstance(self.aligner, RecurrentAligner | TransformerAligner)
        return selected.problem is None and self.aligner.recognizes_each(self.alignable(selected.tensors))

    def _with_other_blocks(self, tensors: Mapping[str, Tensor]) -> Iterator[MappedTensors]:
        """Yield the tensors in each place with exchanged numbers of blocks, if these are recognised.

        The numbers are looked for with random sketches as well, to know what this reaches by chance.
        """
        aligner = self.aligner
        if not isinstance(aligner, TransformerAligner) or not aligner.layers:
            return
        chance = max((s for _, s in self._exchanged_blocks(aligner.control(), tensors)), default=0.0)
        for selected, similarity in self._exchanged_blocks(aligner, tensors):
            if aligner.exceeds(similarity, chance):
                yield selected

    def _exchanged_blocks(
        self, aligner: TransformerAligner, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[MappedTensors, float]]:
        """Yield the tensors with the numbers of W0's most similar blocks, and their similarity with W0."""
        try:
            for view in aligner.renumbered(tensors, self._select, own_numbers=True):
                for selected in self._select(view):
                    if selected.problem is None:
                        yield selected, aligner.align(self.alignable(selected.tensors)).similarity
        except ModelError:  # so many places are a problem of the readings by name already
            return

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
        by_content: whether the kernels were found without their names.
    """

    values: tuple[Any, ...]
    problem: str | None
    missing: tuple[str, ...] = ()
    similarity: float = 0.0
    by_content: bool = False

    def description(self) -> dict[str, Any]:
        """Return the fields of a `ScoreResult` that describe the reading."""
        return {name: getattr(self, name) for name in ("missing", "similarity", "by_content")}


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
