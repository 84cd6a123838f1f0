from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.storage.file_formats import conversion_hint
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import (
    model_bytes,
    model_digest,
    read_model,
    read_model_bytes,
    write_model,
)

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2)}


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensor in TENSORS.items():
        (folder / f"model-{name[0]}.safetensors").write_bytes(model_bytes({name: tensor}))
    entries = weight_map or {name: f"model-{name[0]}.safetensors" for name in TENSORS}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": entries}))
    return index


def is_equal(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == TENSORS.keys() and all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())


def test_read_model_of_hugging_face_folder_reads_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(model_bytes(TENSORS))
    model = read_model(str(tmp_path))
    assert is_equal(model.tensors) and model.digest == model_digest(model_bytes(TENSORS))


def test_read_model_of_sharded_files_joins_them(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for location in (tmp_path, index):
        model = read_model(str(location))
        assert is_equal(model.tensors) and model.digest == model_digest(model_bytes(TENSORS))


def test_read_model_bytes_accepts_every_location_of_read_model(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards")
    (tmp_path / "hf").mkdir()
    digest = write_model(open_storage(str(tmp_path)), TENSORS, {}, "card")
    files = [tmp_path / "hf" / "model.safetensors", tmp_path / "A,b.SAFETENSORS"]
    for file in files:
        file.write_bytes(model_bytes(TENSORS))
    for location in (*files, tmp_path / "hf", tmp_path / "shards", index, tmp_path / "models" / digest):
        assert read_model_bytes(str(location)) == model_bytes(TENSORS)
        assert read_model(str(location)).digest == digest
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"^model: .*is a GGUF model, not safetensors\. Convert it"):
        read_model_bytes(str(tmp_path / "x.gguf"))


def test_read_model_of_sharded_files_has_a_common_limit(tmp_path: Path) -> None:
    write_shards(tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    with pytest.raises(ArtifactError):
        read_model(str(tmp_path), max_bytes=sum(sizes) - 1)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a.weight": "../model-a.safetensors"},
        {"a.weight": "/etc/passwd"},
        {"a.weight": "model-a.bin"},
        {"a.weight": 7},
        {"a.weight": "model-a.safetensors", "c.weight": "model-a.safetensors"},
    ],
)
def test_read_model_of_damaged_index_raises_artifact_error(
    tmp_path: Path, weight_map: dict[str, str]
) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(ArtifactError, match="Fetch the folder again"):
        read_model(str(tmp_path))


def test_read_model_accepts_commas_and_upper_case_endings(tmp_path: Path) -> None:
    for name in ("a,b.safetensors", "M.SAFETENSORS"):
        (tmp_path / name).write_bytes(model_bytes(TENSORS))
        assert is_equal(read_model(str(tmp_path / name)).tensors)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.pt", r"a PyTorch checkpoint, .* mtlsign convert --source .*s\.pt --output .*s\.safetensors"),
        ("s.pth.tar", r"a PyTorch checkpoint, .* --output .*/s\.safetensors"),
        ("s.ckpt", "Lightning or PyTorch checkpoint, .* mtlsign convert"),
        ("s.gguf", "a GGUF model, .* mtlsign convert"),
        ("s.onnx", "an ONNX model, .* mtlsign convert"),
        ("s.h5", "a Keras model, .* save its state_dict"),
    ],
)
def test_read_model_of_another_format_states_what_it_is(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=text):
        read_model(str(tmp_path / name))


@pytest.mark.parametrize("name", ["s.pt", "s.gguf", "no/s.pt", "s.safetensors", "s.weights", "folder"])
def test_read_model_of_missing_path_states_that_it_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_model(str(tmp_path / name))


def test_read_model_of_folder_without_weights_states_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither manifest\.json nor model\.safetensors"):
        read_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"holds PyTorch checkpoints.* mtlsign convert"):
        read_model(str(tmp_path))
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ArtifactError, match="a file of an unknown format"):
        read_model(str(tmp_path / "x"))


def test_conversion_hint_of_safetensors_is_none() -> None:
    assert conversion_hint("a/model.safetensors") is None


def test_read_model_with_grown_file_is_damaged(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    digest = write_model(storage, TENSORS, {"arch": "resnet18"}, "# card\n")
    folder = tmp_path / "models" / digest
    (folder / "config.json").write_bytes(b" " * 5000)
    with pytest.raises(ArtifactError, match=r"config\.json does not match manifest\.json"):
        read_model(str(folder))
