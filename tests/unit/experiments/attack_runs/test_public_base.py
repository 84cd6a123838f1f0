from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtlsign.errors import ModelError
from mtlsign.experiments.attack_runs.public_base import load_public_base
from mtlsign.models.pretrained_transformer import load_pretrained_transformer
from mtlsign.storage.safetensors_io import serialize_safetensors
from tests.unit.attacks.helpers import Maker
from tests.unit.models.test_pretrained_transformer import folder


@pytest.mark.parametrize(("kind", "classes"), [("bert", 2), ("llama", None)])
def test_folder_of_pretrained_transformer_gives_its_weights(
    kind: str, classes: int | None, tmp_path: Path
) -> None:
    folder(tmp_path, kind)
    network = load_pretrained_transformer(tmp_path, classes=classes).network
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    base = load_public_base(str(tmp_path), network)
    expected = {name for name in own if not name.startswith("fc.")}
    assert set(base) == expected
    assert all(torch.equal(tensor, own[name]) for name, tensor in base.items())


def test_checkpoint_with_other_outputs_gives_the_other_layers(tiny_model: Maker, tmp_path: Path) -> None:
    network = tiny_model()
    state = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    state |= {"fc.weight": torch.ones(1000, 3), "fc.bias": torch.ones(1000)}
    file = tmp_path / "base.safetensors"
    file.write_bytes(serialize_safetensors(state))
    base = load_public_base(str(file), network)
    assert set(base) == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.items())


def test_base_of_other_network_raises_model_error(tiny_model: Maker, tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    file.write_bytes(serialize_safetensors({"weight": torch.ones(2, 2)}))
    with pytest.raises(ModelError, match="tensors are missing"):
        load_public_base(str(file), tiny_model())
