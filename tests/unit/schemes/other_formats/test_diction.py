"""Files of DICTION's code, as its `TrainModel.save_model` writes them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes.other_formats import read_diction_file, read_diction_tensors, write_diction_file
from mtlsign.tasks import Task, from_tensors
from tests.unit.attacks.helpers import run

Saver = Callable[..., Path]
BITS = 48


class Mlp(nn.Module):
    """Small network with the layers of that code's MLP."""

    def __init__(self, side: int = 8, width: int = 32) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(side * side, width),
            nn.Linear(width, width),
            nn.Linear(width, 4),
        )
        self.bt_n = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bt_n(self.fc1(x.flatten(1)).relu())
        logits: Tensor = self.fc3(self.fc2(x).relu())
        return logits


class Extractor(nn.Module):
    """Two linear layers before sigmoids, as `RigaExt` (no bias) and `ProjMod` (bias) of that code."""

    def __init__(self, inputs: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden, bias=bias), nn.Linear(hidden, BITS, bias=bias)
        self.sig = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.sig(self.fc2(self.sig(self.fc1(x))))
        return outputs


@pytest.fixture
def network() -> Mlp:
    """Return a network with random statistics."""
    torch.manual_seed(0)
    network = Mlp()
    network.bt_n.running_mean.normal_()  # type: ignore[union-attr]
    return network.eval()


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """Return a function that saves like that program: its classes are then no longer importable."""

    def save(model: nn.Module, **key: Any) -> Path:
        names = {Mlp: "networks.mlp", Extractor: "networks.linear_mod"}
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "networks", types.ModuleType("networks"))
            for cls, name in names.items():
                program = types.ModuleType(name)
                setattr(program, cls.__name__, cls)
                patch.setattr(cls, "__module__", name)
                patch.setitem(sys.modules, name, program)
            state = {
                "net": model.state_dict(),
                "acc": 98.1,
                "epoch": 29,
                "supplementary": {"model": model, **key},
            }
            torch.save(state, tmp_path / "marked.pth")
        return tmp_path / "marked.pth"

    return save


def bits_right(outputs: Tensor, watermark: Tensor) -> int:
    """Bits that agree, as that code compares them."""
    return int(((outputs > 0.5).float() == watermark).sum())


def test_uchida_file_is_verified_as_in_that_code(network: Mlp, save: Saver) -> None:
    matrix, watermark = torch.randn(32, BITS), torch.randint(2, (BITS,)).float()
    path = save(network, matrix_a=matrix, watermark=watermark, ber=0.0, layer_name="fc2.weight")
    marked = read_diction_file(path)
    detection = marked.scheme.verify(marked.load_into(Mlp()), marked.key)
    expected = bits_right((network.fc2.weight.mean(0) @ matrix).sigmoid(), watermark)
    assert (marked.scheme.name, detection.n, detection.matched) == ("uchida", BITS, expected)


def test_riga_file_is_verified_as_in_that_code(network: Mlp, save: Saver) -> None:
    extractor, watermark = Extractor(32, 100, bias=False), torch.randint(2, (BITS,)).float()
    path = save(network, model_ext=extractor, watermark=watermark, ber=0.0, layer_name="fc2.weight")
    marked = read_diction_file(path)
    detection = marked.scheme.verify(marked.load_into(Mlp()), marked.key)
    expected = bits_right(extractor(network.fc2.weight.mean(0)), watermark)
    assert (marked.scheme.name, detection.matched) == ("riga", expected)


def diction_key(network: Mlp) -> dict[str, Any]:
    """Key of DICTION: noise images, a projection of 20 features of fc2, and bits that mostly agree."""
    projection, images = Extractor(20, 64, bias=True), torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        projection.fc2.weight.mul_(20)
    indices = torch.randint(32, (20,)).tolist()
    features = network.fc2(network.bt_n(network.fc1(images.flatten(1)).relu()))[:, indices]
    watermark = (projection(features).mean(0, keepdim=True) > 0.5).float()
    watermark[0, :5] = 1 - watermark[0, :5]
    return {
        "matrix_a": projection, "watermark": watermark, "watermark_r": 1 - watermark, "x_key": images,
        "y_key": torch.zeros(16).long(), "ber": 0.0, "layer_name": ["fc2"], "indices": indices,
    }  # fmt: skip


def test_diction_file_is_verified_as_in_that_code(network: Mlp, save: Saver) -> None:
    marked = read_diction_file(save(network, **diction_key(network)))
    detection = marked.scheme.verify(marked.load_into(Mlp()), marked.key)
    assert (marked.scheme.name, detection.matched, detection.n) == ("diction_file", BITS - 5, BITS)
    other = marked.scheme.verify(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), marked.key)
    assert other.status == "not_verifiable" and other.reason is not None and "'fc2'" in other.reason


def test_diction_file_can_be_attacked_with_its_key(network: Mlp, save: Saver) -> None:
    marked = read_diction_file(save(network, **diction_key(network)))
    x = torch.randn(160, 1, 8, 8)
    task: Task = from_tensors(x, torch.arange(160) % 4)
    model = marked.load_into(Mlp())
    outcome = run("spoil:steps=30,lr=0.01", model, task, scheme=marked.scheme, key=marked.key)
    attacked = marked.scheme.verify(outcome.model, marked.key)
    assert attacked.matched < BITS - 5
    reason = marked.scheme.unsupported_reason(model, task)
    assert reason is not None and "read from files" in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"watermark": None}, "holds no key"),
        ({"watermark": torch.full((1, BITS), 0.5)}, "numbers 0 or 1"),
        ({"indices": [1]}, "key is incomplete"),
        ({"matrix_a": None}, "no layer 'fc1'"),
        ({"x_key": None}, "key is incomplete"),
    ],
)
def test_invalid_key_raises_model_error(
    network: Mlp, save: Saver, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_diction_file(save(network, **{**diction_key(network), **changes}))


def test_files_of_other_schemes_raise_model_error(network: Mlp, save: Saver) -> None:
    path = save(network, watermark=torch.ones(8), mapping_net=nn.Linear(3, 2), layer_name="fc2.weight")
    with pytest.raises(ModelError, match="scheme that is not read"):
        read_diction_file(path)


def test_written_file_has_form_of_unmarked_model(network: Mlp, tmp_path: Path) -> None:
    write_diction_file(tmp_path / "clean.pth", network.state_dict(), accuracy=97.5)
    state = torch.load(tmp_path / "clean.pth", weights_only=True)
    assert list(state) == ["net", "acc", "epoch", "supplementary"] and state["acc"] == 97.5
    Mlp().load_state_dict(read_diction_tensors(tmp_path / "clean.pth"))
    with pytest.raises(ModelError, match="holds no key"):
        read_diction_file(tmp_path / "clean.pth")
