"""A model from a stranger, opened without trust: the header is checked by our own rules before any library
sees the file, and only the tensors that are asked for are ever read (design decision 8).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtlsign.config.service import MIB
from mtlsign.models.checkpoints import MAX_NAME
from mtlsign.service.json_input import read_json
from mtlsign.service.problems import Problem

MAX_DIMS = 8
#: A header of 10,000 tensors has about 2 MB; parsing takes some ten times as much memory.
MAX_HEADER = 8 * MIB
MAX_TENSOR = 64 * MIB
_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def validate_header(path: Path, *, max_tensors: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of a safetensors file, after every check of its header against its size.

    Raises: Problem `not-a-model`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        front = file.read(8)
        length = struct.unpack("<Q", front)[0] if len(front) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            _raise_not_a_model("is no safetensors file: its header's length is impossible or too large")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        _raise_not_a_model("is no safetensors file: its header is no JSON object")
    try:
        header = read_json(raw, most=24 * max_tensors + 1000)  # a tensor's entry has at most 15 such marks
    except ValueError:
        _raise_not_a_model("has a header that is no JSON, is too large, or names something twice")
    if not isinstance(header, dict):
        _raise_not_a_model("has a header that is no JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        _raise_not_a_model("has metadata that are no texts")
    if not 1 <= len(header) <= max_tensors:
        _raise_not_a_model(f"has {len(header)} tensors; 1 to {max_tensors} are allowed")
    found, spans = {}, []
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(name, entry)
        found[name] = (dtype, shape)
        spans.append((start, stop))
    at = 0
    for start, stop in sorted(spans):
        if start != at:
            _raise_not_a_model("has tensors that overlap or leave holes")
        at = stop
    if at != size - 8 - length:
        _raise_not_a_model("has another size than its header says")
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if (
        not isinstance(entry, dict)
        or entry.keys() != {"dtype", "shape", "data_offsets"}
        or len(name) > MAX_NAME
    ):
        _raise_not_a_model("has an entry that is no tensor's")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        _raise_not_a_model("has a tensor of an unknown dtype")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_whole(n) for n in shape):
        _raise_not_a_model(f"has a tensor whose shape is no list of at most {MAX_DIMS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
        _raise_not_a_model("has a tensor whose offsets are no whole numbers")
    start, stop = offsets
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        _raise_not_a_model("has a tensor whose size is not that of its shape")
    return dtype, tuple(shape), start, stop


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _raise_not_a_model(why: str) -> NoReturn:
    raise Problem("not-a-model", f"the model {why}; save the state_dict with safetensors.torch.save_file")


class LazySafetensors(Mapping[str, Tensor]):
    """The tensors of a checked file, each read on first use and kept: claims on one model share one load.

    Not for two threads at the same time.

    Raises: Problem `not-a-model`.
    """

    def __init__(self, path: Path, digest: str, *, max_tensors: int = 10_000) -> None:
        self.digest = digest
        self.header = validate_header(path, max_tensors=max_tensors)
        self._kept: dict[str, Tensor] = {}
        self.framed: tuple[object, dict[str, Tensor], str | None] | None = None
        self.loads = 0
        try:
            self._file = safe_open(os.fspath(path), framework="pt")
        except (SafetensorError, OSError, ValueError):
            _raise_not_a_model("is refused by the safetensors library")

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors kept so far."""
        framed = self.framed[1] if self.framed else {}
        return sum(t.numel() * t.element_size() for t in (*self._kept.values(), *framed.values()))

    def keep_framed(self, graph: object, kernels: dict[str, Tensor], problem: str | None) -> None:
        """Keep what was read in the frame of a graph, or why it cannot be, instead of the tensors."""
        self.framed = graph, kernels, problem
        self._kept.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            dtype, shape = self.header[name]
            if math.prod(shape) * _SIZES[dtype] > MAX_TENSOR:
                return torch.empty(shape, device="meta")  # refused where it is read, without its bytes
            self._kept[name] = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
            self.loads += 1
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)
