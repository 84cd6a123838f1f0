"""GGUF files of untrusted origin, rewritten as safetensors files.

The header is parsed here, within limits, because the library `gguf` reads every value of the metadata before
anything can be checked. Blocks of quantised numbers are computed by the library. Nothing is executed.
The form is that of the specification of GGUF in the repository of ggml.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mtlsign.errors import ModelError

MAGIC = b"GGUF"
#: Largest metadata with the list of tensors, most entries, most elements of one array of texts.
MAX_HEADER_BYTES, MAX_ENTRIES, MAX_TEXTS = 64 * 2**20, 10_000, 2**20
_VERSIONS, _MAX_NAME, _MAX_DIMS, _MAX_ALIGNMENT = (2, 3), 200, 4, 2**16
#: Sizes in bytes of the plain kinds of metadata values.
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
#: Kinds of tensors whose bytes are those of a safetensors type.
_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 28: ("F64", 8), 30: ("BF16", 2)}
#: Kinds of integers, which hold no weights.
_INTEGERS = (24, 25, 26, 27)
#: Elements that are computed at once.
_PART = 2**22


@dataclass(frozen=True)
class GgufTensor:
    """Tensor of a GGUF file.

    Attributes:
        name: its name.
        shape: sizes in PyTorch's order.
        kind: number of the type in GGUF.
        start: first byte in the file.
        byte_count: bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    byte_count: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _Header:
    """Reader of the numbers and texts of a header that never passes its limit."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.position, self._limit = file, 0, min(size, MAX_HEADER_BYTES)

    def take(self, count: int) -> bytes:
        """Return the next bytes. Raises `ModelError` beyond the limit."""
        if count < 0 or self.position + count > self._limit:
            raise _damaged(f"its header does not end within {self._limit:,} bytes")
        data = self._file.read(count)
        self.position += count
        if len(data) != count:
            raise _damaged("it is shorter than its header states")
        return data

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        if self.position + count > self._limit:
            raise _damaged(f"its header does not end within {self._limit:,} bytes")
        self._file.seek(count, 1)
        self.position += count

    def number(self, code: str) -> int:
        """Return an unsigned integer of the struct code."""
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def text(self, limit: int) -> str:
        """Return a text of at most `limit` bytes."""
        length = self.number("Q")
        if length > limit:
            raise _damaged(f"a name has {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _damaged("a name is no UTF-8") from None

    def skip_value(self, kind: int, *, nested: bool = False) -> None:
        """Pass over a value of metadata; an array may hold plain values and texts."""
        if kind in _VALUE_SIZES:
            self.skip(_VALUE_SIZES[kind])
        elif kind == _TEXT:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and not nested:
            inner, count = self.number("I"), self.number("Q")
            if inner in _VALUE_SIZES:
                self.skip(count * _VALUE_SIZES[inner])
            elif inner == _TEXT and count <= MAX_TEXTS:
                for _ in range(count):
                    self.skip_value(inner, nested=True)
            else:
                raise _damaged(f"an array has {count:,} elements of kind {inner}")
        else:
            raise _damaged(f"a value has the unknown kind {kind}")


def parse_gguf_header(file: IO[bytes], size: int, *, max_tensors: int = MAX_ENTRIES) -> list[GgufTensor]:
    """Return the tensors of a GGUF file, sorted by name.

    Args:
        file: at its first byte.
        size: its size in bytes.
        max_tensors: most tensors.

    Raises:
        ModelError: the file is no GGUF file of version 2 or 3, is damaged, or exceeds a limit.
    """
    header = _Header(file, size)
    if header.take(4) != MAGIC or header.number("I") not in _VERSIONS:
        raise _damaged("it is no little-endian GGUF file of version 2 or 3")
    tensor_count, value_count = header.number("Q"), header.number("Q")
    if not 1 <= tensor_count <= max_tensors or value_count > MAX_ENTRIES:
        raise _damaged(f"it states {tensor_count:,} tensors and {value_count:,} values")
    alignment = 32
    for _ in range(value_count):
        key, kind = header.text(2**16), header.number("I")
        if key == "general.alignment" and kind == _UINT32:
            alignment = header.number("I")
        else:
            header.skip_value(kind)
    if not 1 <= alignment <= _MAX_ALIGNMENT:
        raise _damaged(f"its alignment is {alignment:,}")
    entries = [_entry(header) for _ in range(tensor_count)]
    start = -(-header.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        tensor = GgufTensor(name, shape, kind, start + offset, _byte_count(name, shape, kind))
        if name in tensors:
            raise _damaged(f"the tensor {name[:80]!r} is there twice")
        if tensor.start + tensor.byte_count > size:
            raise _damaged(f"the tensor {name[:80]!r} ends after the file")
        tensors[name] = tensor
    return [tensors[name] for name in sorted(tensors)]


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = header.text(_MAX_NAME), header.number("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise _damaged(f"the tensor {name[:80]!r} has {dims} dimensions")
    shape = tuple(header.number("Q") for _ in range(dims))[::-1]
    if not all(1 <= side <= 2**31 for side in shape):
        raise _damaged(f"the tensor {name[:80]!r} has the shape {list(shape)}")
    return name, shape, header.number("I"), header.number("Q")


def _byte_count(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind in _PLAIN:
        return math.prod(shape) * _PLAIN[kind][1]
    block, size = _block(name, kind)
    if shape[-1] % block:
        raise _damaged(f"rows of the tensor {name[:80]!r} are no multiple of {block}")
    return math.prod(shape) // block * size


def _block(name: str, kind: int) -> tuple[int, int]:
    """Return the elements and bytes of a block of quantised numbers."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise ModelError(
            "A quantised GGUF file needs the library gguf. Install `mtlsign[convert]`, or convert the file "
            "where it is installed.",
            field="model",
        ) from None
    try:
        sizes: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _damaged(f"the tensor {name[:80]!r} has the unknown kind {kind}") from None
    if kind in _INTEGERS:
        raise _damaged(f"the tensor {name[:80]!r} holds integers")
    return sizes


def write_as_safetensors(
    file: IO[bytes], size: int, write: Callable[[bytes], object], *, max_bytes: int, max_tensors: int
) -> None:
    """Write the tensors of a GGUF file as one safetensors file, one tensor at a time.

    Plain numbers keep their type; quantised ones become float16.

    Args:
        file: the GGUF file at its first byte.
        size: its size in bytes.
        write: called with the bytes of the new file, in order.
        max_bytes: most bytes of all tensors of the new file.
        max_tensors: most tensors.

    Raises:
        ModelError: the file is damaged, exceeds a limit, or has blocks that the library cannot compute.
    """
    tensors = parse_gguf_header(file, size, max_tensors=max_tensors)
    header: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        name, width = _PLAIN.get(tensor.kind, ("F16", 2))
        stop = offset + width * tensor.count
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    if offset > max_bytes:
        raise ModelError(
            f"The tensors of the GGUF file need {offset:,} bytes; {max_bytes:,} are allowed. "
            "Give a smaller model.",
            field="model",
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for piece in _pieces(file, tensor):
            write(piece)


def _pieces(file: IO[bytes], tensor: GgufTensor) -> Iterator[bytes]:
    """Yield the numbers of a tensor in parts, whose memory is bounded whatever its size."""
    block, size = (1, _PLAIN[tensor.kind][1]) if tensor.kind in _PLAIN else _block(tensor.name, tensor.kind)
    file.seek(tensor.start)
    remaining, most = tensor.byte_count, _PART // block * size
    while remaining:
        data = file.read(min(remaining, most))
        if not data or len(data) % size:
            raise _damaged(f"the tensor {tensor.name[:80]!r} ends after the file")
        remaining -= len(data)
        yield data if tensor.kind in _PLAIN else _dequantised(tensor, np.frombuffer(data, np.uint8), size)


def _dequantised(tensor: GgufTensor, data: npt.NDArray[np.uint8], size: int) -> bytes:
    """Return whole blocks of `size` bytes as float16."""
    from gguf import GGMLQuantizationType, dequantize

    try:
        with np.errstate(all="ignore"):
            values = dequantize(data.reshape(-1, size), GGMLQuantizationType(tensor.kind))
    except NotImplementedError:
        raise ModelError(
            f"The tensor {tensor.name[:80]!r} is of a kind that the library gguf cannot compute. "
            "Give a file of another kind, such as Q8_0 or F16.",
            field="model",
        ) from None
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(values, np.float16).tobytes()


def _damaged(finding: str) -> ModelError:
    return ModelError(f"The GGUF file cannot be read: {finding}. Export it again.", field="model")
