"""Tensors as bytes: one layout, read from anybody."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from mtlsign.errors import ModelError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def header_of(data: bytes) -> dict[str, dict[str, object]]:
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, dict[str, object]] = json.loads(data[8 : 8 + size])
    return header


def test_every_dtype_survives_and_the_library_agrees() -> None:
    tensors = {str(d): (torch.arange(6).reshape(2, 3) % 2).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    data = serialize_safetensors(tensors)
    for read in (parse_safetensors(data), load(data)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_one_layout_whatever_the_order_stride_or_device_of_origin() -> None:
    a, b = torch.randn(4, 3), torch.arange(5)
    data = serialize_safetensors({"b": b, "a": a})
    assert (
        data
        == serialize_safetensors({"a": a.T.contiguous().T, "b": b})
        == serialize_safetensors({"a": a.clone().requires_grad_(True), "b": b})
    )
    header = header_of(data)
    assert list(header) == ["a", "b"] and "__metadata__" not in header
    assert header["a"] == {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    assert header["b"]["data_offsets"] == [48, 88] and (len(data) - 88) % 8 == 0


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(ModelError, match="complex64; convert it to float32"):
        serialize_safetensors({"a": torch.zeros(2, dtype=torch.complex64)})


def bytes_of(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"\xff" * 16,
        struct.pack("<Q", 2**63) + b"{}",
        bytes_of([]),
        bytes_of("x"),
        bytes_of({"a": 1}),
        bytes_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        bytes_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        bytes_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        bytes_of({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        bytes_of({"a": {"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}}, bytes(1)),
        struct.pack("<Q", 6000) + b"[" * 6000,
    ],
)
def test_damaged_or_hostile_bytes(data: bytes) -> None:
    with pytest.raises(ModelError):
        parse_safetensors(data)


def test_limits() -> None:
    data = serialize_safetensors({str(i): torch.zeros(2) for i in range(4)})
    with pytest.raises(ModelError, match="over the limit of 10"):
        parse_safetensors(data, max_bytes=10)
    with pytest.raises(ModelError, match="over 3 tensors"):
        parse_safetensors(data, max_tensors=3)
    with pytest.raises(ModelError, match="0 dimensions"):
        parse_safetensors(data, max_dims=0)
    assert len(parse_safetensors(data, max_tensors=4, max_dims=1)) == 4


@settings(max_examples=60)
@given(at=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_only_model_errors_come_out(at: int, value: int, cut: int) -> None:
    data = bytearray(serialize_safetensors({"a": torch.randn(3), "b": torch.arange(2)}))
    data[at % len(data)] = value
    try:
        parse_safetensors(bytes(data[: len(data) - cut % 40]))
    except ModelError as error:
        assert len(str(error).splitlines()) == 1
