"""Orders of a suspect's channels, as a search changes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mtlsign.models.channel_sets import ChannelSet
from mtlsign.watermark.verification.alignment.assignment import Floats, Indices
from mtlsign.watermark.verification.alignment.inputs import Square
from mtlsign.watermark.verification.alignment.layers import ReferenceLayer

#: Similarity that a channel gains in the place where the suspect has it, in units of one cosine of each
#: kernel that writes it. It decides where damage leaves the sketch undecided.
_STAYING = 0.25


@dataclass
class Orders:
    """Order of a suspect's channels under one symmetry of the inputs.

    Attributes:
        square: symmetry of the inputs.
        mix: matrix of the input channels, [C, C].
        channels: set -> suspect's channel of each of W0's channels; −1 where there is none.
        signs: name of a kernel -> sign of each of W0's rows.
        value: total similarity.
        prefers_own: whether the suspect's own order is preferred where similarities are nearly equal.
    """

    square: Square
    mix: Floats
    channels: dict[int, Indices] = field(default_factory=dict)
    signs: dict[str, Floats] = field(default_factory=dict)
    value: float = 0.0
    prefers_own: bool = False


def staying_similarities(layers: Iterable[ReferenceLayer], sets: Sequence[ChannelSet]) -> list[float]:
    """Return, for each set, the similarity that a channel gains in the place where the suspect has it."""
    weights = [0.0] * len(sets)
    for layer in layers:
        for number in layer.sets_of_rows():
            weights[number] += _STAYING * layer.weighting
    return weights
