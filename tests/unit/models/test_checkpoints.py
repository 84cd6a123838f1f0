from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models import checkpoints
from mtlsign.models.checkpoints import load_checkpoint
from mtlsign.models.families.resnet import torchvision_name
from mtlsign.models.tensor_names import map_names
from tests.unit.models.network import is_equal, network, transformers_name


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    model = network()
    for name, buffer in model.named_buffers():
        buffer.fill_(3) if name.endswith("tracked") else buffer.uniform_(0.5, 1)
    values: dict[str, Tensor] = model.state_dict()
    return values


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.backbone.net."])
@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "bin"])
def test_load_checkpoint_accepts_prefixes_and_endings(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, ending: str
) -> None:
    path = tmp_path / f"w.{ending}"
    tensors = {prefix + name: value.clone() for name, value in state.items()}
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    model = network()
    load_checkpoint(path, model)
    assert is_equal(model, state)


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("model_state",), ("model_state", "model")])
def test_load_checkpoint_unwraps_nested_state_dicts(
    tmp_path: Path, state: dict[str, Tensor], keys: tuple[str, ...]
) -> None:
    held: Any = dict(state)
    for key in keys:
        held = {key: held, "epoch": 7, "optimizer": {"state": {}}}
    torch.save(held, tmp_path / "w.pt")
    model = network()
    load_checkpoint(tmp_path / "w.pt", model)
    assert is_equal(model, state)


def test_load_checkpoint_accepts_folder_and_missing_counters(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    tensors = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "model.safetensors")
    model = network()
    load_checkpoint(tmp_path, model)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_load_checkpoint_converts_half_precision(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.safetensors"
    )
    model = network()
    load_checkpoint(tmp_path / "w.safetensors", model)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_load_checkpoint_accepts_transformers_names(tmp_path: Path, arch: str) -> None:
    state = network(arch).state_dict()
    names = {name: transformers_name(name) for name in state}
    translations = {ours: torchvision_name(theirs) for ours, theirs in names.items()}
    assert all(t is not None and t.target == ours for ours, t in translations.items())
    save_file({names[name]: value for name, value in state.items()}, tmp_path / "w.safetensors")
    model = network(arch)
    load_checkpoint(tmp_path / "w.safetensors", model)
    assert is_equal(model, state)
    wrapped = {f"module.{theirs}" for theirs in names.values()}
    assert map_names(state, wrapped)["conv1.weight"] == "module.resnet.embedder.embedder.convolution.weight"


class CodeExecutionProbe:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("touched").touch, ())


def test_load_checkpoint_of_unusable_file_raises_and_leaves_model_unchanged(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(text: str, path: Path) -> None:
        with pytest.raises(ModelError, match=text):
            load_checkpoint(path, model)
        assert is_equal(model, before)

    def saved(change: dict[str, Tensor], drop: str = "") -> Path:
        tensors = {k: v for k, v in {**state, **change}.items() if k != drop}
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    refused("does not exist", tmp_path / "none.pt")
    torch.save({"model": CodeExecutionProbe()}, tmp_path / "code.pt")
    refused("objects other than tensors", tmp_path / "code.pt")
    torch.save(network(), tmp_path / "whole.pt")
    refused("objects other than tensors", tmp_path / "whole.pt")
    assert not (tmp_path / "touched").exists()
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    refused("no state_dict", tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("no state_dict", tmp_path / "list.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02noise" * 100)
        refused(name, tmp_path / name)
    (tmp_path / "w.weights").write_bytes(b"")
    refused("unknown ending", tmp_path / "w.weights")
    refused("should be", saved({"conv1.weight": torch.ones(4, 3, 3, 3)}))
    refused("NaN or infinity", saved({"bn1.bias": torch.full((4,), math.nan)}))
    refused("Save it as float32", saved({"bn1.bias": torch.ones(4, dtype=torch.int8)}))
    refused("1 of .* missing, such as layer4.1.bn2.bias", saved({}, drop="layer4.1.bn2.bias"))
    refused("2 tensors that the model has not", saved({"a.weight": torch.ones(1), "b.weight": torch.ones(1)}))
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 10)
    refused("Give the weights alone", saved({}))


def test_load_checkpoint_of_deeper_network_raises_model_error(tmp_path: Path) -> None:
    save_file(network("resnet34").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="has not, such as"):
        load_checkpoint(tmp_path / "w.safetensors", network("resnet18"))


def test_load_checkpoint_with_other_classes_keeps_head_if_allowed(tmp_path: Path) -> None:
    state = network(classes=7).state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = network(classes=10)
    head = model.fc.weight.detach().clone()
    with pytest.raises(ModelError, match=r"fc\.weight.*should be"):
        load_checkpoint(path, model)
    load_checkpoint(path, model, classes_may_differ=True)
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and torch.equal(model.fc.weight, head)
    renamed = {name.replace("fc.", "head."): value for name, value in state.items()}
    save_file(renamed, path)
    load_checkpoint(path, network(classes=10), classes_may_differ=True)
    with pytest.raises(ModelError):
        load_checkpoint(path, network(classes=7))


def test_load_checkpoint_states_which_weights_it_took(tmp_path: Path, state: dict[str, Tensor]) -> None:
    averaged = {f"module.{name}": value + 1 for name, value in state.items()}
    path, lines = tmp_path / "w.pth", list[str]()
    torch.save({"model": state, "model_ema": {"n_averaged": torch.tensor(1), **averaged}}, path)
    model = network()
    load_checkpoint(path, model, log=lines.append)
    assert is_equal(model, state)
    assert lines == [
        "The weights are those of 'model'. The file also has model_ema. Choose with --weights-key."
    ]
    load_checkpoint(path, model, key="model_ema")
    assert torch.equal(model.conv1.weight, state["conv1.weight"] + 1)
    with pytest.raises(ModelError, match=r"^weights-key: .* Use one of model, model_ema"):
        load_checkpoint(path, model, key="ema_model")


def test_load_checkpoint_accepts_averaged_weights_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict_ema": state}, tmp_path / "w.ckpt")
    model, lines = network(), list[str]()
    load_checkpoint(tmp_path / "w.ckpt", model, log=lines.append)
    assert is_equal(model, state) and lines == ["The weights are those of 'state_dict_ema'."]


def test_load_checkpoint_with_prefix_as_key_chooses_among_copies(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    copies = {
        f"{prefix}.{n}": t + add for prefix, add in (("model", 0), ("ema", 1)) for n, t in state.items()
    }
    save_file(copies, tmp_path / "w.safetensors")
    model = network()
    with pytest.raises(ModelError, match="several prefixes"):
        load_checkpoint(tmp_path / "w.safetensors", model)
    load_checkpoint(tmp_path / "w.safetensors", model, key="ema")
    assert torch.equal(model.conv1.weight, state["conv1.weight"] + 1)


class TiedNetwork(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 3, bias=False)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_load_checkpoint_accepts_tied_weights_saved_once(tmp_path: Path, name: str) -> None:
    weight = torch.ones(3, 3, 3, 3)
    save_file({name: weight}, tmp_path / "w.safetensors")
    model = TiedNetwork()
    load_checkpoint(tmp_path / "w.safetensors", model)
    assert torch.equal(model.a.weight, weight) and model.b.weight is model.a.weight
    save_file({"c.weight": weight}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"tied weights a\.weight, b\.weight are missing"):
        load_checkpoint(tmp_path / "w.safetensors", model)


def test_load_checkpoint_reads_folders_of_pickled_and_sharded_files(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: state[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = network()
    load_checkpoint(tmp_path, model)
    assert is_equal(model, state)


def test_load_checkpoint_of_another_format_names_conversion(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="is an ONNX model, not safetensors"):
        load_checkpoint(tmp_path / "m.onnx", network())
