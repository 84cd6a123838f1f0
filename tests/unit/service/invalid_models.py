"""Invalid safetensors files, each with one defect, and a valid one."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from typing import Any

import torch
from safetensors.torch import save

VALID_FILE = save({"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.float16)})


def raw_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def header_entry(start: int, stop: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, stop],
    }


EMPTY_ENTRY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def zip_file() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model", bytes(10**6))
    return out.getvalue()


INVALID_FILES = {
    "empty": b"",
    "short": b"\x08\0\0",
    "pickle": pickle.dumps({"a": list(range(50))}),
    "torch zip": zip_file(),
    "100 GB header": raw_file({}, length=100 * 10**9),
    "header past the end": raw_file({"a": header_entry(0, 4)}, length=5000),
    "negative length": struct.pack("<q", -1) + b"{}",
    "no object": raw_file([1]),
    "not JSON": raw_file(b"{nope}"),
    "invalid UTF-8": raw_file(b'{"\xff": 1}'),
    "deep": raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "NaN": raw_file(b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    "duplicate names": raw_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "overlap": raw_file({"a": header_entry(0, 4), "b": header_entry(2, 6)}, b"123456"),
    "same bytes twice": raw_file({"a": header_entry(0, 4), "b": header_entry(0, 4)}, b"1234"),
    "hole": raw_file({"a": header_entry(0, 4), "b": header_entry(8, 12)}, bytes(12)),
    "negative offset": raw_file({"a": header_entry(-4, 0)}, b""),
    "backwards": raw_file({"a": header_entry(4, 0)}, b"1234"),
    "trailing bytes": raw_file({"a": header_entry(0, 4)}, b"12345"),
    "cut short": raw_file({"a": header_entry(0, 400, (100,))}, b"1234"),
    "impossible dtype": raw_file({"a": header_entry(0, 4, dtype="F33")}, b"1234"),
    "dtype no text": raw_file({"a": header_entry(0, 4, dtype=32)}, b"1234"),
    "shape of true": raw_file({"a": header_entry(0, 4, [True])}, b"1234"),
    "shape of float": raw_file({"a": header_entry(0, 4, [1.0])}, b"1234"),
    "huge shape": raw_file({"a": header_entry(0, 4, [2**47] * 8)}, b"1234"),
    "too many dims": raw_file({"a": header_entry(0, 4, [1] * 9)}, b"1234"),
    "metadata no texts": raw_file({"__metadata__": {"x": 1}, "a": header_entry(0, 4)}, b"1234"),
    "extra field": raw_file({"a": {**header_entry(0, 4), "code": "x"}}, b"1234"),
    "long name": raw_file({"a" * 10_001: header_entry(0, 4)}, b"1234"),
    "no tensors": raw_file({}),
    "10^6 tensors": raw_file(("{" + ",".join(f'"{i}":{EMPTY_ENTRY}' for i in range(10**6)) + "}").encode()),
    "2 million empty lists": raw_file(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "20,000 tensors": raw_file({str(i): header_entry(0, 0, (0,)) for i in range(20_000)}),
}  # fmt: skip
