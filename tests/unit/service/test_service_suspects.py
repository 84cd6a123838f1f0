"""Hostile model files: every lie in a header is refused before a byte of the tensors is read."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mtlsign.service.problems import Problem
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors, validate_header
from tests.unit.service.fixtures import bounded

GOOD = save({"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.float16)})


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(start: int, stop: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, stop],
    }


EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model", bytes(10**6))
    return out.getvalue()


LIES = {
    "empty": b"",
    "short": b"\x08\0\0",
    "pickle": pickle.dumps({"a": list(range(50))}),
    "torch zip": zip_bomb(),
    "100 GB header": raw({}, length=100 * 10**9),
    "header past the end": raw({"a": tensor(0, 4)}, length=5000),
    "negative length": struct.pack("<q", -1) + b"{}",
    "no object": raw([1]),
    "not JSON": raw(b"{nope}"),
    "invalid UTF-8": raw(b'{"\xff": 1}'),
    "deep": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "NaN": raw(b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    "duplicate names": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "overlap": raw({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456"),
    "same bytes twice": raw({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234"),
    "hole": raw({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "negative offset": raw({"a": tensor(-4, 0)}, b""),
    "backwards": raw({"a": tensor(4, 0)}, b"1234"),
    "trailing bytes": raw({"a": tensor(0, 4)}, b"12345"),
    "cut short": raw({"a": tensor(0, 400, (100,))}, b"1234"),
    "impossible dtype": raw({"a": tensor(0, 4, dtype="F33")}, b"1234"),
    "dtype no text": raw({"a": tensor(0, 4, dtype=32)}, b"1234"),
    "shape of true": raw({"a": tensor(0, 4, [True])}, b"1234"),
    "shape of float": raw({"a": tensor(0, 4, [1.0])}, b"1234"),
    "huge shape": raw({"a": tensor(0, 4, [2**47] * 8)}, b"1234"),
    "too many dims": raw({"a": tensor(0, 4, [1] * 9)}, b"1234"),
    "metadata no texts": raw({"__metadata__": {"x": 1}, "a": tensor(0, 4)}, b"1234"),
    "extra field": raw({"a": {**tensor(0, 4), "code": "x"}}, b"1234"),
    "long name": raw({"a" * 600: tensor(0, 4)}, b"1234"),
    "no tensors": raw({}),
    "10^6 tensors": raw(("{" + ",".join(f'"{i}":{EMPTY}' for i in range(10**6)) + "}").encode()),
    "2 million empty lists": raw(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "20,000 tensors": raw({str(i): tensor(0, 0, (0,)) for i in range(20_000)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused_without_growth(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(LIES[name])
    with bounded(), pytest.raises(Problem) as caught:
        LazySafetensors(path, "d")
    assert caught.value.kind == "not-a-model"


def test_an_honest_file_is_read_lazily_and_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(GOOD)
    found = LazySafetensors(path, "d")
    assert set(found) == {"a", "b"} and len(found) == 2 and found.kept_bytes == 0
    assert found["a"].tolist() == [0, 1, 2, 3] and found["a"] is found["a"] and found.loads == 1
    assert found.kept_bytes == 16


@settings(max_examples=150)
@given(st.binary(max_size=8), st.integers(0, len(GOOD) - 1), st.integers(0, 8))
def test_a_damaged_file_is_refused_or_still_whole(
    tmp_path_factory: Any, patch: bytes, at: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(GOOD[:at] + patch + GOOD[at + cut :])
    try:
        found = LazySafetensors(path, "d")
    except Problem as problem:
        assert problem.kind == "not-a-model"
        return
    for name, (_, shape) in validate_header(path, max_tensors=100).items():
        assert tuple(found[name].shape) == shape
