"""Tests of the safetensors writer and of the reader of untrusted files."""

from __future__ import annotations

import io
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file

from mtlsign.errors import ModelError
from mtlsign.storage.safetensors_io import (
    HeaderLimits,
    TensorEntry,
    parse_safetensors,
    parse_safetensors_header,
    serialize_safetensors,
)

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


TENSORS = {
    "z.weight": torch.arange(6.0).reshape(2, 3).t(),
    "a.flag": torch.tensor([True]),
    "m.batches": torch.tensor(7),
    "m.half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}


def _header(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert isinstance(header, dict)
    return header


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_serialize_safetensors_of_every_dtype_is_read_by_both_readers() -> None:
    tensors = {str(d): (torch.arange(6).reshape(2, 3) % 2).to(d) for d in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    data = serialize_safetensors(tensors)
    for read in (parse_safetensors(data), load(data)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_serialize_safetensors_layout_is_independent_of_order_and_strides() -> None:
    a, b = torch.randn(4, 3), torch.arange(5)
    data = serialize_safetensors({"b": b, "a": a})
    assert (
        data
        == serialize_safetensors({"a": a.T.contiguous().T, "b": b})
        == serialize_safetensors({"a": a.clone().requires_grad_(True), "b": b})
    )
    header = _header(data)
    assert list(header) == ["a", "b"] and "__metadata__" not in header
    assert header["a"] == {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    assert header["b"]["data_offsets"] == [48, 88] and (len(data) - 88) % 8 == 0


def test_serialize_safetensors_unnamed_dtype_raises_model_error() -> None:
    with pytest.raises(ModelError, match=r"complex64\. Convert it to float32"):
        serialize_safetensors({"a": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"\xff" * 16,
        struct.pack("<Q", 2**63) + b"{}",
        _file([]),
        _file("x"),
        _file({"a": 1}),
        _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"a": {"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}}, bytes(1)),
        struct.pack("<Q", 6000) + b"[" * 6000,
    ],
)
def test_parse_safetensors_damaged_bytes_raise_model_error(data: bytes) -> None:
    with pytest.raises(ModelError):
        parse_safetensors(data)


def test_parse_safetensors_over_limits_raises_model_error() -> None:
    data = serialize_safetensors({str(i): torch.zeros(2) for i in range(4)})
    with pytest.raises(ModelError, match="over the limit of 10"):
        parse_safetensors(data, max_bytes=10)
    with pytest.raises(ModelError, match="0 to 3 are allowed"):
        parse_safetensors(data, max_tensors=3)
    with pytest.raises(ModelError, match="at most 0 whole numbers"):
        parse_safetensors(data, max_dims=0)
    assert len(parse_safetensors(data, max_tensors=4, max_dims=1)) == 4


@settings(max_examples=60)
@given(at=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_parse_safetensors_of_corrupted_bytes_raises_only_model_error(at: int, value: int, cut: int) -> None:
    data = bytearray(serialize_safetensors({"a": torch.randn(3), "b": torch.arange(2)}))
    data[at % len(data)] = value
    try:
        parse_safetensors(bytes(data[: len(data) - cut % 40]))
    except ModelError as error:
        assert len(str(error).splitlines()) == 1


def test_serialize_safetensors_is_sorted_deterministic_and_readable_by_library(tmp_path: Path) -> None:
    data = serialize_safetensors(TENSORS)
    assert data == serialize_safetensors(dict(reversed(TENSORS.items())))
    header = _header(data)
    assert list(header) == sorted(TENSORS) and "__metadata__" not in header
    ends = [entry["data_offsets"] for entry in header.values()]
    assert ends[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ends))
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(data)
    for tensors in (load(data), load_file(tmp_path / "x.safetensors"), parse_safetensors(data)):
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("z.weight"), TENSORS["z.weight"])


def test_serialize_safetensors_is_independent_of_memory_layout_and_sharing() -> None:
    images = torch.rand(2, 3, 4, 4)
    flat = images.reshape(-1)
    shared = {"a": images.to(memory_format=torch.channels_last), "b": flat[:8], "c": flat[::2], "d": flat}
    assert serialize_safetensors(shared) == serialize_safetensors(
        {name: tensor.clone().contiguous() for name, tensor in shared.items()}
    )
    assert serialize_safetensors({"p": torch.nn.Parameter(images)}) == serialize_safetensors({"p": images})


GOOD: dict[str, Any] = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",
        b"PK\x03\x04" + bytes(60),
        struct.pack("<Q", 2**63) + b"{}",
        _file(b"[]"),
        _file(b"null"),
        _file(b"[" * 100_000),
        _file({"a": 1}),
        _file({"a": {}}),
        _file(GOOD),
        _file(GOOD, bytes(5)),
        _file(b"\xff\xff"),
        _file({"a": {**GOOD["a"], "dtype": "Q7"}}, bytes(4)),
        _file({"a": {**GOOD["a"], "shape": [-1]}}, bytes(4)),
        _file({"a": {**GOOD["a"], "shape": [2**62, 2**62]}}, bytes(4)),
        _file({"a": {**GOOD["a"], "shape": "1"}}, bytes(4)),
        _file({"a": {**GOOD["a"], "shape": [1] * 9}}, bytes(4)),
        _file({**GOOD, "b": GOOD["a"]}, bytes(4)),
        _file({"a": {**GOOD["a"], "data_offsets": [4, 0]}}, bytes(4)),
        _file({"__metadata__": {"x": 1}, **GOOD}, bytes(4)),
        _file({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}),
    ],
)
def test_parse_safetensors_hostile_file_raises_model_error(data: bytes) -> None:
    with pytest.raises(ModelError):
        parse_safetensors(data)


def test_parse_safetensors_over_byte_limit_raises_before_parsing() -> None:
    with pytest.raises(ModelError):
        parse_safetensors(_file(GOOD, bytes(4)), max_bytes=10)


SCALAR = st.none() | st.integers(-2, 2**65) | st.text(max_size=3) | st.lists(st.integers(-1, 9), max_size=9)
ENTRY = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), SCALAR, max_size=4)


@given(
    st.binary(max_size=99)
    | st.binary(max_size=99).map(_file)
    | SCALAR.map(_file)
    | st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | SCALAR, max_size=3).map(_file)
    | ENTRY.map(lambda change: _file({"a": {**GOOD["a"], **change}}, bytes(4)))
)
def test_parse_safetensors_of_any_bytes_raises_only_model_error(data: bytes) -> None:
    try:
        tensors = parse_safetensors(data)
    except ModelError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def _read_header(data: bytes, **limits: int) -> dict[str, TensorEntry]:
    return parse_safetensors_header(io.BytesIO(data), len(data), limits=HeaderLimits(**limits))


def test_parse_safetensors_header_returns_entries_without_data() -> None:
    data = serialize_safetensors({"a": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.int8)})
    entries = _read_header(data)
    assert entries == {"a": TensorEntry("F32", (2, 3), 0, 24), "b": TensorEntry("I8", (5,), 24, 29)}
    assert [entry.byte_count for entry in entries.values()] == [24, 5]
    assert _read_header(serialize_safetensors({})) == {}


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_header_bytes": 60}, "header length"),
        ({"max_tensors": 1}, "has 2 tensors"),
        ({"min_tensors": 3}, "has 2 tensors"),
        ({"max_dims": 1}, "at most 1 whole numbers"),
        ({"max_name_length": 2}, "longer than 2 characters"),
        ({"max_values": 5}, "is too large"),
    ],
)
def test_parse_safetensors_header_over_limit_raises_model_error(limits: dict[str, int], problem: str) -> None:
    data = serialize_safetensors({"one": torch.zeros(2, 3), "two": torch.ones(5)})
    with pytest.raises(ModelError, match=f"^model: .*{problem}.*"):
        _read_header(data, **limits)


@pytest.mark.parametrize(
    "data",
    [
        _file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
              b'"data_offsets":[0,1]}}', b"x"),
        _file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"xx"),
        _file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
               "b": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"xx"),
        _file({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"),
        _file({"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}, b"x"),
    ],
    ids=["duplicate name", "gap", "overlap", "boolean size", "float size"],
)  # fmt: skip
def test_parse_safetensors_header_inconsistent_entries_raise_model_error(data: bytes) -> None:
    with pytest.raises(ModelError, match="Save the state_dict"):
        _read_header(data)
