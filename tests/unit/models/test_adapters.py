from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtlsign.errors import ModelError
from mtlsign.models.conversion import convert_weights
from mtlsign.storage.model_folder import read_model

W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
BASE = {"net.fc.weight": W, "net.fc.bias": torch.ones(6), "net.head.weight": torch.zeros(3, 6)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
ADAPTER = {"base_model.model.net.fc.lora_A.weight": A, "base_model.model.net.fc.lora_B.weight": B}


def folder(path: Path, adapter: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    target = path / "adapter"
    target.mkdir()
    (target / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(ADAPTER if adapter is None else adapter, target / "adapter_model.safetensors")
    save_file(BASE, path / "base.safetensors")
    return target


def merged(path: Path, source: Path) -> dict[str, torch.Tensor]:
    convert_weights(source, path / "out.safetensors", base=path / "base.safetensors")
    return dict(read_model(str(path / "out.safetensors")).tensors)


@pytest.mark.parametrize(("config", "scale"), [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)])
def test_convert_weights_of_adapter_merges_it(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    tensors = merged(tmp_path, folder(tmp_path, **config))
    torch.testing.assert_close(tensors["net.fc.weight"], W + scale * B @ A)
    assert tensors.keys() == BASE.keys() and torch.equal(tensors["net.head.weight"], BASE["net.head.weight"])


def test_convert_weights_of_adapter_takes_layers_that_were_trained_as_a_whole(tmp_path: Path) -> None:
    head = torch.ones(3, 6)
    tensors = merged(tmp_path, folder(tmp_path, ADAPTER | {"base_model.model.net.head.weight": head}))
    assert torch.equal(tensors["net.head.weight"], head)


@pytest.mark.parametrize(("config", "text"), [
    ({"peft_type": "IA3"}, "no plain LoRA"), ({"use_dora": True}, "no plain LoRA"),
    ({"rank_pattern": {"fc": 4}}, "single layers"), ({"r": 0}, "r in adapter_config"),
    ({"r": True}, "r in adapter_config"), ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_alpha": 1e9}, "lora_alpha"),
])  # fmt: skip
def test_convert_weights_of_other_adapter_is_refused(
    tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        merged(tmp_path, folder(tmp_path, **config))


def test_convert_weights_of_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    wrong = {name.replace("fc", "other"): tensor for name, tensor in ADAPTER.items()}
    with pytest.raises(ModelError, match="0 tensors"):
        merged(tmp_path, folder(tmp_path, wrong))


@pytest.mark.parametrize(("down", "up"), [(A[:, :3], B), (A[:1], B), (A.long(), B)])
def test_convert_weights_of_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, down: torch.Tensor, up: torch.Tensor
) -> None:
    names = list(ADAPTER)
    with pytest.raises(ModelError):
        merged(tmp_path, folder(tmp_path, {names[0]: down.contiguous(), names[1]: up}))


def test_convert_weights_of_adapter_alone_asks_for_its_model(tmp_path: Path) -> None:
    source, base = folder(tmp_path), tmp_path / "base.safetensors"
    with pytest.raises(ModelError, match="--base"):
        convert_weights(source, tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match="no folder of an adapter"):
        convert_weights(base, tmp_path / "o.safetensors", base=base)
