"""Untrusted model files, read lazily: the header is checked before any library opens the file.

Only the tensors that a claim needs are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtlsign.config.service import MIB
from mtlsign.errors import ModelError
from mtlsign.service.problems import Problem
from mtlsign.storage.safetensors_io import HeaderLimits, TensorEntry, parse_safetensors_header
from mtlsign.watermark.verification.selection import SuspectReading

MAX_DIMS = 8
#: A header of 10,000 tensors has about 2 MB; parsing takes about ten times as much memory.
MAX_HEADER = 8 * MIB
MAX_TENSOR = 64 * MIB


def validate_header(path: Path, *, max_tensors: int) -> dict[str, TensorEntry]:
    """Return the entry of each tensor of a safetensors file after checking its header against its size.

    Raises:
        Problem: `not-a-model`.
    """
    limits = HeaderLimits(
        max_header_bytes=MAX_HEADER, min_tensors=1, max_tensors=max_tensors, max_dims=MAX_DIMS,
        max_values=24 * max_tensors + 1000,
    )  # fmt: skip
    try:
        with path.open("rb") as file:
            entries = parse_safetensors_header(file, path.stat().st_size, limits=limits)
    except ModelError as error:
        raise Problem("not-a-model", error.detail) from None
    return entries


def _raise_not_a_model(problem: str) -> NoReturn:
    raise Problem("not-a-model", f"{problem} Save the state_dict with safetensors.torch.save_file.")


@dataclass
class CachedReadings:
    """Readings of a suspect that the models of the read-outs have made without a key.

    Attributes:
        models: the models of the read-outs.
        readings: what they have read.
    """

    models: tuple[object, ...]
    readings: tuple[SuspectReading, ...]


class LazySafetensors(Mapping[str, Tensor]):
    """Tensors of a checked file. Each is read at its first use and cached for further claims on the model.

    Not thread-safe.

    Args:
        path: the file.
        digest: SHA-256 of the file, hex.
        max_tensors: most tensors.

    Raises:
        Problem: `not-a-model`.
    """

    def __init__(self, path: Path, digest: str, *, max_tensors: int = 10_000) -> None:
        self.digest = digest
        self.header = validate_header(path, max_tensors=max_tensors)
        self._tensors: dict[str, Tensor] = {}
        self.cached: CachedReadings | None = None
        self.loads = 0
        try:
            self._file = safe_open(os.fspath(path), framework="pt")
        except (SafetensorError, OSError, ValueError):
            _raise_not_a_model("The safetensors library refuses the file.")

    @property
    def cached_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        values = [reading.values for reading in self.cached.readings] if self.cached else ()
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*self._tensors.values(), *tensors))

    def cache_readings(self, cached: CachedReadings) -> None:
        """Replace the tensors in memory by what the read-outs of the last detector have read."""
        self.cached = cached
        self.release_tensors()

    def release_tensors(self) -> None:
        """Remove the file's tensors from memory."""
        self._tensors.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            entry = self.header[name]
            if entry.byte_count > MAX_TENSOR:
                # A tensor without data: its reader refuses it by its size.
                return torch.empty(entry.shape, device="meta")
            self._tensors[name] = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
            self.loads += 1
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.header))

    def __len__(self) -> int:
        return len(self.header)
