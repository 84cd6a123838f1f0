"""Description of the inputs and outputs that a network is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a primary task and the number of its classes.

    Attributes:
        channels: image channels.
        height: image height in pixels.
        width: image width in pixels.
        classes: outputs of the network.
        kind: type of the inputs. Only images exist today; text and bytes become further kinds.
    """

    channels: int
    height: int
    width: int
    classes: int
    kind: Literal["image"] = "image"
