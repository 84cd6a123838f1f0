"""Tests of model folders: deterministic bytes, checked digests, hostile input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import model_bytes, model_digest, read_model, write_model

TENSORS = {
    "z.weight": torch.arange(6.0).reshape(2, 3).t(),
    "a.flag": torch.tensor([True]),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def test_read_model_returns_written_model_and_checks_digest(store: Storage) -> None:
    digest = write_model(store, TENSORS, {"arch": "resnet18", "width": 16}, "# card\n")
    assert digest == model_digest(model_bytes(TENSORS))
    folder = f"{store.uri}/models/{digest}"
    assert store.list() == [
        f"models/{digest}/{n}" for n in ("README.md", "config.json", "manifest.json", "model.safetensors")
    ]
    model = read_model(folder)
    assert (model.config, model.digest, model.location) == ({"arch": "resnet18", "width": 16}, digest, folder)
    assert torch.equal(model.tensors["z.weight"], TENSORS["z.weight"])
    single_file = read_model(f"{folder}/model.safetensors")
    assert (single_file.config, single_file.digest) == ({}, digest)
    assert "tensor(" not in repr(model)


def test_write_model_of_existing_model_keeps_card_and_refuses_other_config(store: Storage) -> None:
    digest = write_model(store, TENSORS, {"a": 1}, "first")
    assert write_model(store, TENSORS, {"a": 1}, "second") == digest
    assert store.read(f"models/{digest}/README.md", 99) == b"first"
    with pytest.raises(ArtifactError, match="already holds"):
        write_model(store, TENSORS, {"a": 2}, "first")
    with pytest.raises(ArtifactError, match="plain finite values"):
        write_model(store, TENSORS, {"a": float("nan")}, "")


def test_read_model_of_damaged_renamed_or_incomplete_folder_raises(store: Storage, tmp_path: Path) -> None:
    digest = write_model(store, TENSORS, {}, "")
    folder = Path(store.uri, "models", digest)
    folder.rename(folder.with_name("0" * 64))
    with pytest.raises(ArtifactError, match="another model than its name"):
        read_model(str(folder.with_name("0" * 64)))
    folder.with_name("0" * 64).rename(folder)
    with pytest.raises(ArtifactError, match="over its limit"):
        read_model(str(folder), max_bytes=100)
    (folder / "config.json").write_bytes(b"{} ")
    with pytest.raises(ArtifactError, match=r"config.json does not match manifest.json"):
        read_model(str(folder))
    (folder / "manifest.json").unlink()
    for missing in (folder, tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        with pytest.raises(ArtifactError):
            read_model(str(missing))
    with pytest.raises(StorageError):
        read_model("hdfs://x/model")


def test_read_model_reads_safetensors_file_of_library(tmp_path: Path) -> None:
    (tmp_path / "other model.safetensors").write_bytes(save({"w": torch.ones(2)}, {"format": "pt"}))
    assert torch.equal(read_model(str(tmp_path / "other model.safetensors")).tensors["w"], torch.ones(2))


def test_model_digest_is_64_hexadecimal_digits() -> None:
    assert len(model_digest(model_bytes(TENSORS))) == 64
