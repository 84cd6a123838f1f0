"""Safetensors files: written deterministically, read with limits. Reading never executes anything."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.storage.json_io import parse_bounded_json

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element, for each dtype that a header may name: those of safetensors 0.8."""

#: Dtypes that files from outside may have in addition; this package does not write them.
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()} | {
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

_MAX_WHOLE_NUMBER = 2**48
_FIX = "Save the state_dict with safetensors.torch.save_file."


@dataclass(frozen=True)
class HeaderLimits:
    """Limits of an untrusted safetensors header.

    `max_values` counts commas and opening brackets; a tensor with 8 dimensions has at most 15.
    """

    max_header_bytes: int = 16 * 1024 * 1024
    min_tensors: int = 0
    max_tensors: int = 10_000
    max_dims: int = 8
    max_name_length: int = 10_000
    max_values: int = 2_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of one tensor; `start` and `stop` are byte offsets into the data after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def byte_count(self) -> int:
        """Size of the tensor in bytes."""
        return self.stop - self.start


def serialize_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return safetensors bytes: sorted by name in header and data, no metadata, header padded to 8 bytes.

    The library's own writer sorts by dtype first and therefore does not give this layout.

    Raises:
        ModelError: a tensor has a dtype without a safetensors name.
    """
    header: dict[str, object] = {}
    chunks, offset = [], 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"Tensor {name!r} has dtype {tensor.dtype}. Convert it to float32 first.", field="model"
            )
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *chunks])


def parse_safetensors(
    data: bytes, *, max_bytes: int = 2 * 1024**3, max_tensors: int = 10_000, max_dims: int = 8
) -> dict[str, Tensor]:
    """Parse untrusted safetensors bytes.

    Args:
        data: the file.
        max_bytes: most bytes of the file.
        max_tensors: most tensors.
        max_dims: most dimensions of a tensor.

    Returns:
        The tensors by name, in sorted order, on the CPU. Tensors of a dtype that PyTorch lacks are left out.

    Raises:
        ModelError: the bytes are no valid safetensors file, or are over a limit.
    """
    from safetensors import SafetensorError, deserialize

    if len(data) > max_bytes:
        raise ModelError(
            f"The file has {len(data)} bytes, which is over the limit of {max_bytes}. Pass a smaller model.",
            field="model",
        )
    limits = HeaderLimits(max_tensors=max_tensors, max_dims=max_dims)
    parse_safetensors_header(io.BytesIO(data), len(data), limits=limits)
    try:
        views = sorted(deserialize(data))  # type: ignore[no-untyped-call]  # the library has no types
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError):
        _raise_invalid("The safetensors library refuses the file.")
    return {name: _tensor(view) for name, view in views if view["dtype"] in _TORCH_DTYPES}


def _tensor(view: Mapping[str, Any]) -> Tensor:
    """Return the tensor of an entry that the safetensors library has read."""
    dtype = _TORCH_DTYPES[view["dtype"]]
    if not len(view["data"]):
        return torch.empty(view["shape"], dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).reshape(view["shape"])


def parse_safetensors_header(
    file: BinaryIO, size: int, *, limits: HeaderLimits | None = None
) -> dict[str, TensorEntry]:
    """Read and check the header of an untrusted safetensors file. No tensor is read.

    Args:
        file: the file, positioned at its first byte.
        size: its size in bytes.
        limits: limits of the header; the default accepts at most 10,000 tensors.

    Returns:
        The entry of each tensor by name, in the order of the header. The entries cover the data without
        overlaps or gaps.

    Raises:
        ModelError: the header is invalid, is over a limit, or does not match `size`.
    """
    limits = limits or HeaderLimits()
    front = file.read(8)
    length = struct.unpack("<Q", front)[0] if len(front) == 8 else 0
    if not 2 <= length <= min(limits.max_header_bytes, size - 8):
        _raise_invalid("The file is not a safetensors file: its header length is invalid or too large.")
    header = _header_object(file.read(length), limits)
    entries = {name: _entry(name, value, limits) for name, value in header.items()}
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            _raise_invalid("The tensors of the file overlap or leave gaps.")
        position = entry.stop
    if position != size - 8 - length:
        _raise_invalid("The file does not have the size that its header states.")
    return entries


def _header_object(data: bytes, limits: HeaderLimits) -> dict[str, Any]:
    if not data.startswith(b"{"):
        _raise_invalid("The file is not a safetensors file: its header is not a JSON object.")
    try:
        header = parse_bounded_json(data, max_values=limits.max_values)
    except ValueError:
        _raise_invalid("The header is not JSON, is too large, or names something twice.")
    if not isinstance(header, dict):
        _raise_invalid("The header is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _raise_invalid("The metadata of the file are not strings.")
    if not limits.min_tensors <= len(header) <= limits.max_tensors:
        _raise_invalid(
            f"The file has {len(header)} tensors; {limits.min_tensors} to {limits.max_tensors} are allowed."
        )
    return header


def _entry(name: str, value: Any, limits: HeaderLimits) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _raise_invalid("An entry of the header does not describe a tensor.")
    if len(name) > limits.max_name_length:
        _raise_invalid(f"The name of a tensor is longer than {limits.max_name_length} characters.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _raise_invalid("A tensor has an unknown dtype.")
    if not isinstance(shape, list) or len(shape) > limits.max_dims or not all(map(_is_whole_number, shape)):
        _raise_invalid(f"The shape of a tensor is not a list of at most {limits.max_dims} whole numbers.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_whole_number, offsets)):
        _raise_invalid("The offsets of a tensor are not two whole numbers.")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        _raise_invalid("The size of a tensor does not match its shape.")
    return TensorEntry(dtype, tuple(shape), start, stop)


def _is_whole_number(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_WHOLE_NUMBER


def _raise_invalid(problem: str) -> NoReturn:
    raise ModelError(f"{problem} {_FIX}", field="model")
