"""Untrusted safetensors files: every invalid header is refused before a tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlsign.service.problems import Problem
from mtlsign.service.verifier.lazy_safetensors import CachedReadings, LazySafetensors, validate_header
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.verification.selection import SuspectReading
from tests.unit.service.fixtures import limit_memory_and_time
from tests.unit.service.invalid_models import INVALID_FILES, VALID_FILE


@pytest.mark.parametrize("name", INVALID_FILES)
def test_lazy_safetensors_with_invalid_file_is_refused_within_memory_limit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(INVALID_FILES[name])
    with limit_memory_and_time(), pytest.raises(Problem) as caught:
        LazySafetensors(path, "d")
    assert caught.value.kind == "not-a-model"


def test_lazy_safetensors_with_valid_file_reads_each_tensor_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(VALID_FILE)
    model = LazySafetensors(path, "d")
    assert set(model) == {"a", "b"} and len(model) == 2 and model.cached_bytes == 0
    assert model["a"].tolist() == [0, 1, 2, 3] and model["a"] is model["a"] and model.loads == 1
    assert model.cached_bytes == 16


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("C64", 64)],
)
def test_both_readers_accept_unneeded_tensor_of_rare_type(dtype: str, size: int, tmp_path: Path) -> None:
    """The service reads lazily, commands and councils at once; eight elements have `size` bytes."""
    end = int.from_bytes(VALID_FILE[:8], "little") + 8
    header, data = json.loads(VALID_FILE[8:end]), VALID_FILE[end:]
    header["rare"] = {"dtype": dtype, "shape": [8], "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(size))
    assert LazySafetensors(path, "d")["a"].tolist() == [0, 1, 2, 3]
    assert parse_safetensors(path.read_bytes())["a"].tolist() == [0, 1, 2, 3]


def test_cache_readings_replaces_tensors_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(VALID_FILE)
    model = LazySafetensors(path, "d")
    assert model.cached is None and model["a"].numel() == 4
    values = (torch.zeros(10), {"k": torch.zeros(3).double()})
    cached = CachedReadings((object(), object()), (SuspectReading(values, None),))
    model.cache_readings(cached)
    assert model.cached is cached and model.cached_bytes == 40 + 24
    assert model["a"].tolist() == [0, 1, 2, 3] and model.loads == 2 and model.cached_bytes == 40 + 24 + 16
    model.cache_readings(CachedReadings((object(),), (SuspectReading((), "damaged"),)))
    assert model.cached_bytes == 0


@settings(max_examples=150)
@given(st.binary(max_size=8), st.integers(0, len(VALID_FILE) - 1), st.integers(0, 8))
def test_lazy_safetensors_with_damaged_file_is_refused_or_consistent(
    tmp_path_factory: Any, patch: bytes, at: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(VALID_FILE[:at] + patch + VALID_FILE[at + cut :])
    try:
        model = LazySafetensors(path, "d")
    except Problem as problem:
        assert problem.kind == "not-a-model"
        return
    for name, entry in validate_header(path, max_tensors=100).items():
        assert tuple(model[name].shape) == entry.shape
