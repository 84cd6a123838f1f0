"""Samples of a data set, before they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """Files of one image.

    Attributes:
        image: the photograph.
        labels: label images and other annotations, in the order of the data set's reader.
    """

    image: Path
    labels: tuple[Path, ...]
