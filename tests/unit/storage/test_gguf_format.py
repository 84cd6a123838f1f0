"""GGUF files rewritten as safetensors files; damaged and hostile ones stay within the limits."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.conversion import read_weights
from mtlsign.storage import gguf_format
from mtlsign.storage.gguf_format import parse_gguf_header, write_as_safetensors
from mtlsign.storage.safetensors_io import parse_safetensors

KINDS = gguf.GGMLQuantizationType


def write(path: Path) -> bytes:
    """Write a file with metadata of all kinds, and tensors of several kinds; return its bytes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float64("a.real", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_token_list(["a", "bb", "ccc"])
    writer.add_array("a.numbers", [1, 2, 3])
    matrix = rng.normal(size=(6, 64)).astype(np.float32)
    writer.add_tensor("plain", matrix)
    writer.add_tensor("half", matrix.astype(np.float16))
    writer.add_tensor("vector", matrix[0])
    for kind in (KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1):
        writer.add_tensor(kind.name, gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf")


def rewritten(data: bytes, *, max_bytes: int = 2**20, max_tensors: int = 100) -> dict[str, Tensor]:
    target = io.BytesIO()
    write_as_safetensors(
        io.BytesIO(data), len(data), target.write, max_bytes=max_bytes, max_tensors=max_tensors
    )
    return parse_safetensors(target.getvalue(), max_bytes=2**21)


def test_tensors_are_those_of_the_library(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    expected = read_weights(tmp_path / "m.gguf").tensors
    tensors = rewritten(data)
    assert tensors.keys() == expected.keys()
    assert tensors["plain"].dtype == torch.float32 and tensors["half"].dtype == torch.float16
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(
            tensor.float(), expected[name].half().float() if name[0] == "Q" else expected[name]
        )
    monkeypatch.setattr(gguf_format, "_PART", 64)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in rewritten(data).items())


def header(tensors: int = 1, values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not end"), (b"PK\x03\x04" + bytes(40), "no little-endian"),
        (header(version=1), "no little-endian"), (header(2**60), "states"), (header(0), "states"),
        (header(1, 2**40), "states"), (header(1, 1, struct.pack("<Q", 2**62)), "bytes"),
        (header(1, 1, text(b"k") + struct.pack("<I", 99)), "unknown kind"),
        (header(1, 1, text(b"k") + struct.pack("<IIQ", 9, 0, 2**60)), "does not end"),
        (header(1, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "elements"),
        (header(1, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 3)), "elements"),
        (header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 0) + entry()), "alignment"),
        (header(1, 0, entry(dims=(1,) * 9)), "dimensions"), (header(1, 0, entry(dims=(0,))), "shape"),
        (header(1, 0, entry(dims=(2**40,))), "shape"), (header(1, 0, entry(kind=77)), "unknown kind"),
        (header(1, 0, entry(kind=26)), "integers"), (header(1, 0, entry(kind=2)), "multiple of 32"),
        (header(1, 0, entry(offset=2**60)), "ends after the file"), (header(1, 0, entry()), "ends after"),
        (header(2, 0, entry() + entry() + bytes(64)), "twice"),
        (header(1, 0, entry(name=b"\xff\xfe")), "UTF-8"),
        (header(1, 0, entry(name=b"n" * 300)), "a name has"),
    ],
)  # fmt: skip
def test_damaged_header_raises_model_error(content: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_gguf_header(io.BytesIO(content), len(content))


def test_overlapping_tensors_are_bounded_by_the_size_of_the_result(data: bytes) -> None:
    entries = b"".join(entry(dims=(1024,), name=b"t%d" % index) for index in range(50))
    content = header(50, 0, entries)
    content += bytes(-len(content) % 32 + 4096)
    with pytest.raises(ModelError, match="are allowed"):
        rewritten(content, max_bytes=50 * 4096 - 1)
    assert len(rewritten(content, max_bytes=50 * 4096)) == 50
    with pytest.raises(ModelError, match="tensors"):
        rewritten(content, max_tensors=49)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_changed_bytes_raise_model_errors_alone(data: bytes, choice: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(choice.draw(st.integers(1, 4))):
        place = choice.draw(st.integers(0, min(len(data), 900) - 1))
        changed[place] = choice.draw(st.integers(0, 255))
    content = bytes(changed[: choice.draw(st.integers(1, len(data)))])
    target = io.BytesIO()
    try:
        write_as_safetensors(
            io.BytesIO(content), len(content), target.write, max_bytes=2**20, max_tensors=100
        )
    except ModelError:
        return
    assert len(target.getvalue()) < 2**21
