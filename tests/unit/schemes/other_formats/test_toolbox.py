"""Files of the Watermark-Robustness-Toolbox, as its `embed.py` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtlsign.errors import ModelError
from mtlsign.schemes.adi import AdiScheme
from mtlsign.schemes.other_formats import read_toolbox_file, read_toolbox_tensors, write_toolbox_file
from mtlsign.schemes.uchida import UchidaScheme
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import Maker, flat_network, run

LEGACY = [False, True]


def toolbox_file(path: Path, network: nn.Module, *, legacy: bool = False, **entries: Any) -> Path:
    """Write the dictionary of the toolbox; by default for Uchida's scheme in the network's fifth kernel."""
    rng = np.random.default_rng(0)
    index = [i for i, p in enumerate(network.parameters()) if p.dim() == 4][4]
    weight = list(network.parameters())[index]
    matrix = rng.normal(0, 1, [40, weight[0].numel()]).astype(np.float32)
    content = {
        "model": network.state_dict(),
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "layer_idx": index, "x_wm": matrix, "y_wm": rng.integers(0, 2, size=40), **entries,
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def extracted(content: dict[str, Any], model: nn.Module) -> np.ndarray:
    """Bits as `Uchida.extract` of the toolbox reads them."""
    weight = list(model.parameters())[content["layer_idx"]].detach().numpy()
    bits: np.ndarray = np.matmul(content["x_wm"], np.mean(weight, axis=0).reshape(-1)) >= 0
    return bits


@pytest.mark.parametrize("legacy", LEGACY)
def test_uchida_file_is_verified_as_in_toolbox(tmp_path: Path, tiny_model: Maker, legacy: bool) -> None:
    model = tiny_model()
    path = toolbox_file(tmp_path / "best.pth", model, legacy=legacy)
    marked = read_toolbox_file(path, "uchida")
    network = marked.load_into(tiny_model(1))
    content = torch.load(path, weights_only=False)
    matched = int((extracted(content, model) == (content["y_wm"] == 1)).sum())
    detection = marked.scheme.verify(network, marked.key)
    assert (detection.matched, detection.n, detection.null_rate) == (matched, 40, 0.5)
    fitted = toolbox_file(path, model, y_wm=extracted(content, model).astype(np.int64))
    assert read_toolbox_file(fitted, "uchida").scheme.verify(network, marked.key).matched == matched
    again = read_toolbox_file(fitted, "uchida")
    assert again.scheme.verify(network, again.key).matched == 40


def test_marked_file_can_be_attacked(tmp_path: Path, tiny_task: Task, tiny_model: Maker) -> None:
    marked = read_toolbox_file(toolbox_file(tmp_path / "best.pth", tiny_model()), "uchida")
    network = marked.load_into(tiny_model(1))
    before = marked.scheme.watermark_loss(network, marked.key)
    outcome = run("spoil:steps=8", network, tiny_task, scheme=marked.scheme, key=marked.key)
    after = marked.scheme.watermark_loss(outcome.model, marked.key)
    assert before is not None and after is not None and not torch.equal(before, after)


@pytest.mark.parametrize("one_hot", [False, True])
def test_key_images_have_null_rate_of_their_scheme(tmp_path: Path, tiny_model: Maker, one_hot: bool) -> None:
    model, images = tiny_model(), torch.randn(9, 1, 24, 24)
    with torch.no_grad():
        answers = model(images).argmax(1).numpy()
    labels = np.eye(4, dtype=np.float32)[answers] if one_hot else answers
    path = toolbox_file(tmp_path / "best.pth", model, x_wm=images.numpy(), y_wm=labels)
    for scheme, rate in {"adi": 0.25, "zhang_noise": 0.25, "frontier_stitching": 0.5}.items():
        marked = read_toolbox_file(path, scheme, classes=4)
        detection = marked.scheme.verify(marked.load_into(tiny_model(1)), marked.key)
        assert (detection.matched, detection.n, detection.null_rate) == (9, 9, rate)


def test_names_of_data_parallel_lose_their_prefix(tmp_path: Path, tiny_model: Maker) -> None:
    model = tiny_model()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    marked = read_toolbox_file(toolbox_file(tmp_path / "best.pth", model, model=state), "uchida")
    assert set(marked.tensors) == set(model.state_dict())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layer_idx": 500}, "no position of a parameter"),
        ({"layer_idx": 1}, "no kernel"),
        ({"x_wm": np.zeros([40, 3], np.float32)}, "no finite matrix of 40 x"),
        ({"y_wm": np.full(40, 2)}, "numbers 0 or 1"),
        ({"y_wm": None}, "no array 'y_wm'"),
        ({"model": {}}, "no state dict"),
        ({"model": Path}, "holds other objects"),
    ],
)
def test_invalid_entries_raise_model_error(
    tmp_path: Path, tiny_model: Maker, entries: dict[str, Any], message: str
) -> None:
    path = toolbox_file(tmp_path / "best.pth", tiny_model(), **entries)
    with pytest.raises(ModelError, match=message):
        read_toolbox_file(path, "uchida")


def test_unknown_scheme_and_network_raise_model_error(tmp_path: Path, tiny_model: Maker) -> None:
    path = toolbox_file(tmp_path / "best.pth", tiny_model())
    with pytest.raises(ModelError, match="'deepsigns' are not read"):
        read_toolbox_file(path, "deepsigns")
    with pytest.raises(ModelError, match="no key images"):
        read_toolbox_file(path, "adi")
    with pytest.raises(ModelError, match="does not fit the file"):
        read_toolbox_file(path, "uchida").load_into(flat_network())


def test_written_file_has_form_of_toolbox(tmp_path: Path, tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    scheme = UchidaScheme(key_size=64)
    key = scheme.generate_key(model, tiny_task, 1)
    path = tmp_path / "best.pth"
    write_toolbox_file(path, model.state_dict(), key)
    assert b"numpy._core" not in path.read_bytes() and path.read_bytes()[:2] != b"PK"
    content = torch.load(path, weights_only=False)
    assert list(content) == ["model", "optimizer", "layer_idx", "x_wm", "y_wm"]
    assert (content["x_wm"].dtype, content["x_wm"].shape) == (np.float32, (64, key.projection.shape[0]))
    expected = scheme.verify(model, key).matched
    assert int((extracted(content, model) == (content["y_wm"] == 1)).sum()) == expected
    optimizer = torch.optim.SGD(tiny_model(1).parameters(), lr=0.1)
    optimizer.load_state_dict(content["optimizer"])
    back = read_toolbox_file(path, "uchida")
    assert back.scheme.verify(back.load_into(tiny_model(1)), back.key).matched == expected
    assert read_toolbox_tensors(path).keys() == model.state_dict().keys()
    write_toolbox_file(path, model.state_dict())
    assert list(torch.load(path, weights_only=True)) == ["model", "optimizer"]
    with pytest.raises(ModelError, match="no convolution of this network"):
        write_toolbox_file(path, flat_network().state_dict(), key)


def test_written_key_images_are_read_again(tmp_path: Path, tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), AdiScheme(key_size=12)
    key, path = scheme.generate_key(model, tiny_task, 1), tmp_path / "best.pth"
    write_toolbox_file(path, model.state_dict(), key)
    back = read_toolbox_file(path, "adi", classes=4)
    assert torch.equal(back.key.inputs, key.inputs) and torch.equal(back.key.classes, key.classes)
    assert back.scheme.verify(model, back.key).matched == scheme.verify(model, key).matched
