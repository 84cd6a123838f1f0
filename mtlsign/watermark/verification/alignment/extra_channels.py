"""Channels that an attacker added: duplicates of others, and channels that no kernel reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer, unit_rows
from mtlsign.watermark.verification.alignment.suspect import SuspectLayer, suspect_layers

#: Rows are equal if the cosine of their angle is this near to 1.
_TOLERANCE = 1e-3
#: Share of a kernel's squared norm below which a column counts as zero.
_UNREAD = 1e-9
#: Duplicates in one layer can appear only after those of an earlier layer are merged.
_PASSES = 3


def without_extra_channels(
    suspect: Mapping[str, SuspectLayer], layers: Mapping[str, ReferenceLayer], sets: Sequence[ChannelSet]
) -> dict[str, SuspectLayer]:
    """Merge the duplicates of sets that have more channels than W0, and drop channels that are not read."""
    current = dict(suspect)
    for _ in range(_PASSES):
        changed = False
        for number, members in enumerate(sets):
            if _size(current, number) > members.size and members.blocks == 1:
                kernels = _reduced(current, number)
                changed = changed or kernels is not None
                if kernels is not None:
                    current = suspect_layers(kernels, layers, sets)
        if not changed:
            break
    return current


def _size(suspect: Mapping[str, SuspectLayer], number: int) -> int:
    """Return the suspect's number of channels of a set; 0 if no kernel has them."""
    for part in suspect.values():
        for side in (part.rows, part.columns):
            if number in side.places:
                return len(side.places[number])
    return 0


def _reduced(suspect: Mapping[str, SuspectLayer], number: int) -> dict[str, Floats] | None:
    """Return all kernels with fewer channels of one set; None if none can be removed."""
    writers = [part for part in suspect.values() if number in part.rows.places]
    readers = [part for part in suspect.values() if number in part.columns.places and part.layer.groups == 1]
    size = _size(suspect, number)
    same = np.ones((size, size), dtype=bool)
    for part in writers:
        rows = unit_rows(part.kernel[part.rows.places[number]].reshape(size, -1))
        cosines = rows.astype(np.float32) @ rows.T.astype(np.float32)  # four times as many rows are allowed
        same &= (np.abs(cosines) if part.layer.free_signs else cosines) > 1 - _TOLERANCE
    first = same.argmax(1) if writers else np.arange(size)  # the first channel with equal rows
    first = np.where(first[first] == first, first, np.arange(size))
    columns = {part.layer.weight: _merged_columns(part, number, first, writers) for part in readers}
    read = np.zeros(size, dtype=bool)
    for kernel in columns.values():
        norms = np.square(kernel).sum((0, 2))
        read |= norms > _UNREAD * max(float(norms.sum()), 1e-300)
    remaining = np.flatnonzero((first == np.arange(size)) & (read if readers else True))
    if len(remaining) in (0, size):
        return None
    kernels = {name: part.kernel for name, part in suspect.items()}
    for part in readers:
        kernel = np.delete(part.kernel, part.columns.places[number], axis=1)
        place = int(part.columns.places[number][0])
        merged = columns[part.layer.weight][:, remaining]
        kernels[part.layer.weight] = np.concatenate([kernel[:, :place], merged, kernel[:, place:]], axis=1)
    for part in writers:
        removed = np.setdiff1d(np.arange(size), remaining)
        name = part.layer.weight
        kernels[name] = np.delete(kernels[name], part.rows.places[number][removed], axis=0)
    return kernels


def _merged_columns(
    part: SuspectLayer, number: int, first: Indices, writers: Sequence[SuspectLayer]
) -> Floats:
    """Return a reader's columns of the set, with those of duplicates added to the first one's."""
    columns = part.kernel[:, part.columns.places[number]].copy()
    factors = np.ones(len(first))
    scaled = [writer for writer in writers if not writer.layer.free_signs]
    if scaled:  # without a batch norm a larger row has a smaller column
        rows = scaled[0].kernel[scaled[0].rows.places[number]].reshape(len(first), -1)
        norms = np.linalg.norm(rows, axis=1)
        factors = norms / np.where(norms[first] > 0, norms[first], 1.0)
    for channel in np.flatnonzero(first != np.arange(len(first))):
        columns[:, first[channel]] += factors[channel] * columns[:, channel]
    return columns
