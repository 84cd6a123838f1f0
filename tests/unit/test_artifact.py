"""Models and kits as written: deterministic bytes, checked digests, hostile input, nothing secret shown."""

from __future__ import annotations

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
from safetensors.torch import load, load_file, save

from mtlsign.errors import ArtifactError, KeyMaterialError, ModelError, MTLSignError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import model_bytes, model_digest, read_model, write_model
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret, encrypt_envelope
from mtlsign.watermark.kit import KIT_PURPOSE, OwnerKit, read_kit, write_kit

SECRET = EncryptionSecret.from_kit_key(bytes(32))
TENSORS = {
    "z.weight": torch.arange(6.0).reshape(2, 3).t(),
    "a.flag": torch.tensor([True]),
    "m.batches": torch.tensor(7),
    "m.half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def _header(data: bytes) -> dict[str, Any]:
    found = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert isinstance(found, dict)
    return found


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- tensors ---


def test_model_bytes_are_sorted_deterministic_and_readable_by_the_library(tmp_path: Path) -> None:
    data = model_bytes(TENSORS)
    assert data == model_bytes(dict(reversed(TENSORS.items())))
    header = _header(data)
    assert list(header) == sorted(TENSORS) and "__metadata__" not in header
    ends = [entry["data_offsets"] for entry in header.values()]
    assert ends[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ends))
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(data)
    for found in (load(data), load_file(tmp_path / "x.safetensors"), parse_safetensors(data)):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("z.weight"), TENSORS["z.weight"])


def test_memory_layout_and_sharing_do_not_change_the_bytes() -> None:
    images = torch.rand(2, 3, 4, 4)
    flat = images.reshape(-1)
    shared = {"a": images.to(memory_format=torch.channels_last), "b": flat[:8], "c": flat[::2], "d": flat}
    assert model_bytes(shared) == model_bytes(
        {name: tensor.clone().contiguous() for name, tensor in shared.items()}
    )
    assert model_bytes({"p": torch.nn.Parameter(images)}) == model_bytes({"p": images})
    assert len(model_digest(model_bytes(shared))) == 64


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ModelError):
        model_bytes({"x": torch.zeros(2, dtype=torch.complex64)})


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
def test_hostile_tensor_files_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        parse_safetensors(data)


def test_byte_limits_hold_before_anything_is_parsed() -> None:
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
def test_the_tensor_reader_raises_nothing_else(data: bytes) -> None:
    try:
        found = parse_safetensors(data)
    except ModelError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


# --- models ---


def test_a_model_comes_back_with_its_digest_checked(store: Storage) -> None:
    digest = write_model(store, TENSORS, {"arch": "resnet18", "width": 16}, "# card\n")
    assert digest == model_digest(model_bytes(TENSORS))
    folder = f"{store.uri}/models/{digest}"
    assert store.list() == [
        f"models/{digest}/{n}" for n in ("README.md", "config.json", "manifest.json", "model.safetensors")
    ]
    found = read_model(folder)
    assert (found.config, found.digest, found.location) == ({"arch": "resnet18", "width": 16}, digest, folder)
    assert torch.equal(found.tensors["z.weight"], TENSORS["z.weight"])
    bare = read_model(f"{folder}/model.safetensors")
    assert (bare.config, bare.digest) == ({}, digest)
    assert "tensor(" not in repr(found)


def test_writing_a_model_again_keeps_the_first_card_and_refuses_another_config(store: Storage) -> None:
    digest = write_model(store, TENSORS, {"a": 1}, "first")
    assert write_model(store, TENSORS, {"a": 1}, "second") == digest
    assert store.read(f"models/{digest}/README.md", 99) == b"first"
    with pytest.raises(ArtifactError, match="already holds"):
        write_model(store, TENSORS, {"a": 2}, "first")
    with pytest.raises(ArtifactError, match="plain finite values"):
        write_model(store, TENSORS, {"a": float("nan")}, "")


def test_a_model_folder_that_is_damaged_renamed_or_incomplete_is_refused(
    store: Storage, tmp_path: Path
) -> None:
    digest = write_model(store, TENSORS, {}, "")
    folder = Path(store.uri, "models", digest)
    folder.rename(folder.with_name("0" * 64))
    with pytest.raises(ArtifactError, match="another model than its name"):
        read_model(str(folder.with_name("0" * 64)))
    folder.with_name("0" * 64).rename(folder)
    with pytest.raises(ArtifactError, match="over its limit"):
        read_model(str(folder), max_bytes=100)
    (folder / "config.json").write_bytes(b"{} ")
    with pytest.raises(ArtifactError, match=r"config.json is not what manifest.json says"):
        read_model(str(folder))
    (folder / "manifest.json").unlink()
    for missing in (folder, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(ArtifactError):
            read_model(str(missing))
    with pytest.raises(StorageError):
        read_model("hdfs://x/model")


def test_a_foreign_safetensors_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "their model.safetensors").write_bytes(save({"w": torch.ones(2)}, {"format": "pt"}))
    assert torch.equal(read_model(str(tmp_path / "their model.safetensors")).tensors["w"], torch.ones(2))


# --- kits ---


def _kit(head: bytes | None = b"head") -> OwnerKit:
    opening = KeyOpening(spec=b'{"hush":1}', public_key=b"\1" * 32, signature=b"\2" * 64)
    return OwnerKit(
        opening, b"reference-bytes", b"w0-bytes", head, {"task": "digits", "created": "2026", "score": 0.5}
    )


@pytest.mark.parametrize("secret", [SECRET, EncryptionSecret.from_passphrase(b"correct horse")])
@pytest.mark.parametrize("head", [None, b"", b"head"])
def test_a_kit_comes_back_and_lies_sealed(
    store: Storage, secret: EncryptionSecret, head: bytes | None
) -> None:
    kit_id = write_kit(store, _kit(head), secret)
    assert len(kit_id) == 16 and kit_id != write_kit(store, _kit(head), secret)
    folder = f"{store.uri}/kits/{kit_id}"
    assert read_kit(folder, secret) == read_kit(f"{folder}/kit.sealed", secret) == _kit(head)
    for name in store.list():
        content = store.read(name, 9999)
        assert not any(word in content for word in (b"hush", b"w0-bytes", b"digits", b"\2" * 64))


def test_a_kit_shows_nothing(store: Storage) -> None:
    assert repr(_kit()) == str(_kit()) == "Kit(hidden)"
    kit_id = write_kit(store, _kit(), SECRET)
    with pytest.raises(KeyMaterialError, match="; give the one it was sealed under") as caught:
        read_kit(f"{store.uri}/kits/{kit_id}", EncryptionSecret.from_kit_key(b"\1" * 32))
    assert "hush" not in str(caught.value)


def test_a_damaged_or_missing_kit_is_refused(store: Storage) -> None:
    kit_id = write_kit(store, _kit(), SECRET)
    with pytest.raises(ArtifactError):
        read_kit(f"{store.uri}/kits/none", SECRET)
    sealed = store.read(f"kits/{kit_id}/kit.sealed", 9999)
    store.write(f"kits/{kit_id}/kit.sealed", sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="is not what"):
        read_kit(f"{store.uri}/kits/{kit_id}", SECRET)
    with pytest.raises(KeyMaterialError, match="damaged"):
        read_kit(f"{store.uri}/kits/{kit_id}/kit.sealed", SECRET)


def _lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


OPENING = _kit().opening.to_json().encode()
CONTENT = (
    st.binary(max_size=60)
    | st.lists(st.binary(max_size=9), max_size=7).map(lambda parts: b"mtlsign/kit/v0\n" + _lp(*parts))
    | st.lists(st.sampled_from([OPENING, b"{}", b"[]", b"\xff", b"{", b""]), max_size=7).map(
        lambda parts: b"mtlsign/kit/v0\n" + _lp(*parts)
    )
    | st.binary(max_size=20).map(lambda tail: b"mtlsign/kit/v0\n" + _lp(OPENING, b"{}", b"r", b"w") + tail)
)


@given(CONTENT)
@settings(max_examples=60)
def test_the_kit_parser_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.sealed"
    path.write_bytes(encrypt_envelope(content, SECRET, purpose=KIT_PURPOSE))
    try:
        kit = read_kit(str(path), SECRET)
    except MTLSignError:
        return
    assert kit.opening == _kit().opening
