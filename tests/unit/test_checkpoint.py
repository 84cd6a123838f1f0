"""Weights under foreign names, in foreign files, from hostile hands."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models import checkpoints
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.checkpoints import load_checkpoint, map_names, select_tensors_untrusted, torchvision_name


def network(arch: str = "resnet18", classes: int = 10, width: int = 4) -> Any:
    return build(architecture_for(arch, channels=1, classes=classes, width=width, stem="cifar"))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    model = network()
    for name, buffer in model.named_buffers():
        buffer.fill_(3) if name.endswith("tracked") else buffer.uniform_(0.5, 1)
    values: dict[str, Tensor] = model.state_dict()
    return values


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def transformers_name(name: str) -> str:
    """The inverse of the table, written independently: torchvision's names -> transformers'."""
    parts = name.split(".")
    leaf = parts[-1]
    if parts[0] == "fc":
        return f"classifier.1.{leaf}"
    if parts[0] in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}.{leaf}"
    block = f"resnet.encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}.shortcut.{'convolution' if parts[3] == '0' else 'normalization'}.{leaf}"
    kind = "convolution" if parts[2].startswith("conv") else "normalization"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{kind}.{leaf}"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.backbone.net."])
@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "bin"])
def test_prefixes_and_endings(tmp_path: Path, state: dict[str, Tensor], prefix: str, ending: str) -> None:
    path = tmp_path / f"w.{ending}"
    tensors = {prefix + name: value.clone() for name, value in state.items()}
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    model = network()
    load_checkpoint(path, model)
    assert same(model, state)


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("model_state",), ("model_state", "model")])
def test_nested_state_dicts(tmp_path: Path, state: dict[str, Tensor], keys: tuple[str, ...]) -> None:
    held: Any = dict(state)
    for key in keys:
        held = {key: held, "epoch": 7, "optimizer": {"state": {}}}
    torch.save(held, tmp_path / "w.pt")
    model = network()
    load_checkpoint(tmp_path / "w.pt", model)
    assert same(model, state)


def test_folder_and_missing_counters(tmp_path: Path, state: dict[str, Tensor]) -> None:
    tensors = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "model.safetensors")
    model = network()
    load_checkpoint(tmp_path, model)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_half_precision_is_converted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.safetensors"
    )
    model = network()
    load_checkpoint(tmp_path / "w.safetensors", model)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].half().float())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_transformers_names(tmp_path: Path, arch: str) -> None:
    state = network(arch).state_dict()
    names = {name: transformers_name(name) for name in state}
    assert all(torchvision_name(theirs) == ours for ours, theirs in names.items())
    save_file({names[name]: value for name, value in state.items()}, tmp_path / "w.safetensors")
    model = network(arch)
    load_checkpoint(tmp_path / "w.safetensors", model)
    assert same(model, state)
    wrapped = {f"module.{theirs}" for theirs in names.values()}
    assert map_names(state, wrapped)["conv1.weight"] == "module.resnet.embedder.embedder.convolution.weight"


def test_own_transformers_names_stay_as_they_are() -> None:
    names = ["resnet.embedder.embedder.convolution.weight", "classifier.1.weight"]
    assert map_names(names, names) == {name: name for name in names}


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("touched").touch, ())


def test_files_that_are_refused(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(text: str, path: Path) -> None:
        with pytest.raises(ModelError, match=text):
            load_checkpoint(path, model)
        assert same(model, before)

    def saved(change: dict[str, Tensor], drop: str = "") -> Path:
        tensors = {k: v for k, v in {**state, **change}.items() if k != drop}
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    refused("no file", tmp_path / "none.pt")
    torch.save({"model": Runs()}, tmp_path / "code.pt")
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
    (tmp_path / "w.ckpt").write_bytes(b"")
    refused("ending", tmp_path / "w.ckpt")
    refused("should be", saved({"conv1.weight": torch.ones(4, 3, 3, 3)}))
    refused("NaN or infinity", saved({"bn1.bias": torch.full((4,), math.nan)}))
    refused("save it as float32", saved({"bn1.bias": torch.ones(4, dtype=torch.int8)}))
    refused("1 of .* missing, such as layer4.1.bn2.bias", saved({}, drop="layer4.1.bn2.bias"))
    refused("2 tensors that the model has not", saved({"a.weight": torch.ones(1), "b.weight": torch.ones(1)}))
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 10)
    refused("give the weights alone", saved({}))


def test_a_deeper_networks_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file(network("resnet34").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="has not, such as"):
        load_checkpoint(tmp_path / "w.safetensors", network("resnet18"))


def test_another_number_of_classes(tmp_path: Path) -> None:
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


def test_several_prefixes_are_ambiguous_unless_one_is_empty() -> None:
    wanted = ["a.weight", "a.bias"]
    both = [prefix + name for prefix in ("model.", "ema.") for name in wanted]
    with pytest.raises(ModelError, match=r"several prefixes \('ema.', 'model.'\)"):
        map_names(wanted, both)
    assert map_names(wanted, [*both, *wanted]) == {name: name for name in wanted}


words = st.text("ab.", min_size=1, max_size=6)


@given(
    wanted=st.lists(words, unique=True, min_size=1, max_size=5),
    prefix=words,
    other=st.lists(words, max_size=8),
)
def test_map_names_is_right_or_refuses(wanted: list[str], prefix: str, other: list[str]) -> None:
    available = [f"{prefix}.{name}" for name in wanted] + other
    try:
        mapped = map_names(wanted, available)
    except ModelError as error:
        assert "several prefixes" in str(error)
        return
    assert list(mapped) == wanted and set(mapped.values()) <= set(available)
    (found,) = {mapped[name][: -len(name)] for name in wanted}
    assert not found or found.endswith(".")
    assert all(mapped[name] == found + name for name in wanted)


@given(wanted=st.lists(st.text(max_size=8), max_size=4), available=st.lists(st.text(max_size=12), max_size=6))
def test_map_names_raises_nothing_else(wanted: list[str], available: list[str]) -> None:
    with contextlib.suppress(ModelError):
        assert set(map_names(wanted, available)) <= set(wanted)


def test_a_suspects_tapped_tensors_are_read() -> None:
    tensors = {
        "net.a.weight": torch.ones(2, 2).bfloat16(),
        "net.n.weight": torch.ones(2),
        "net.evil": torch.ones(1),
    }
    mapped = select_tensors_untrusted(
        {"a.weight": (2, 2)}, tensors, optional={"n.weight": (2,), "m.weight": (2,)}
    )
    assert mapped.problem is None
    assert set(mapped.tensors) == {"a.weight", "n.weight"}
    assert all(value.dtype == torch.float32 for value in mapped.tensors.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.full((2, 2), math.nan), "NaN"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), "infinity"),
        (torch.ones(2, 2, dtype=torch.int8), "int8"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(3, 2), "should be"),
        (torch.ones(1).expand(10**12), "should be"),
        (torch.ones(2, 2).to_sparse(), "plain tensor"),
        (torch.ones(2, 2, device="meta"), "plain tensor"),
        ("text", "plain tensor"),
        (None, "plain tensor"),
    ],
)
def test_a_hostile_suspect_gives_a_reason(value: Any, text: str) -> None:
    mapped = select_tensors_untrusted({"a.weight": (2, 2)}, {"a.weight": value})
    assert not mapped.tensors and mapped.problem is not None and text in mapped.problem


def test_hostile_names_give_a_reason() -> None:
    for names in ([], ["x." * 10_000 + "a.weight"], ["p.a.weight", "q.a.weight"]):
        mapped = select_tensors_untrusted({"a.weight": (1,)}, {name: torch.ones(1) for name in names})
        assert not mapped.tensors and mapped.problem
    odd: Any = {7: torch.ones(1), None: torch.ones(1)}
    assert select_tensors_untrusted({"a.weight": (1,)}, odd).problem
    broken: Any = 5
    assert "TypeError" in (select_tensors_untrusted({"a.weight": (1,)}, broken).problem or "")


def test_decoys_beside_the_weights_are_not_read_as_the_model() -> None:
    real, decoy = torch.ones(4, 1, 3, 3), torch.zeros(4, 1, 3, 3)
    wanted = {"conv1.weight": (4, 1, 3, 3)}
    mapped = select_tensors_untrusted(wanted, {"net.conv1.weight": real, "conv1.weight": decoy})
    assert mapped.problem is not None and "several prefixes" in mapped.problem
    assert select_tensors_untrusted(wanted, {"net.conv1.weight": real}).problem is None
