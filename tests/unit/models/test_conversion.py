from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mtlsign.config.convert import ConvertSettings
from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.conversion import convert_weights
from mtlsign.storage.model_folder import read_model

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2)}
AVERAGED = {name: tensor + 1 for name, tensor in TENSORS.items()}


def test_convert_weights_of_checkpoint_writes_chosen_entry(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "state_dict_ema": AVERAGED, "epoch": 3}, tmp_path / "c.ckpt")
    conversion = convert_weights(tmp_path / "c.ckpt", tmp_path / "raw.safetensors")
    assert conversion.statement is not None and "state_dict_ema" in conversion.statement
    model = read_model(str(tmp_path / "raw.safetensors"))
    assert torch.equal(model.tensors["a.weight"], TENSORS["a.weight"]) and model.digest == conversion.digest
    convert_weights(tmp_path / "c.ckpt", tmp_path / "ema.safetensors", key="state_dict_ema")
    averaged = read_model(str(tmp_path / "ema.safetensors")).tensors
    assert torch.equal(averaged["a.weight"], AVERAGED["a.weight"])


def test_convert_weights_of_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    assert convert_weights(tmp_path / "w.npz", tmp_path / "w.safetensors").tensors == 2
    np.savez(tmp_path / "code.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ModelError, match="cannot be read"):
        convert_weights(tmp_path / "code.npz", tmp_path / "code.safetensors")


@pytest.mark.parametrize("library", ["onnx", "gguf"])
def test_convert_weights_without_its_library_names_it(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / f"m.{library}").write_bytes(b"")
    with pytest.raises(ModelError, match=f"needs the library {library}. Install it with `pip install"):
        convert_weights(tmp_path / f"m.{library}", tmp_path / "m.safetensors")


def test_convert_weights_of_onnx_model(tmp_path: Path) -> None:
    import onnx

    tensors = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in TENSORS.items()]
    graph = onnx.helper.make_graph([], "g", [], [], initializer=tensors)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    convert_weights(tmp_path / "m.onnx", tmp_path / "m.safetensors")
    assert torch.equal(read_model(str(tmp_path / "m.safetensors")).tensors["a.weight"], TENSORS["a.weight"])


def test_convert_weights_of_gguf_model(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "test")
    for name, tensor in TENSORS.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_weights(tmp_path / "m.gguf", tmp_path / "m.safetensors")
    assert torch.equal(read_model(str(tmp_path / "m.safetensors")).tensors["a.weight"], TENSORS["a.weight"])


def test_convert_weights_never_replaces_a_file(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "c.pt")
    (tmp_path / "w.safetensors").write_bytes(b"old")
    with pytest.raises(ArtifactError, match="exists already"):
        convert_weights(tmp_path / "c.pt", tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"must end with \.safetensors"):
        convert_weights(tmp_path / "c.pt", tmp_path / "w.pt")


def test_convert_command_prints_statement_and_file(tmp_path: Path) -> None:
    from mtlsign.commands.convert import convert

    torch.save({"model_ema": AVERAGED}, tmp_path / "c.pth")
    settings = ConvertSettings.of(
        {"source": str(tmp_path / "c.pth"), "output": str(tmp_path / "w.safetensors")}
    )
    output = convert.function(settings)
    assert output is not None and output.document["tensors"] == 2
    assert output.text.startswith("The weights are those of 'model_ema'.")
