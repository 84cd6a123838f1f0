from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError, SettingsError
from mtlsign.models import architectures
from mtlsign.models.initial_weights import initialize_from_checkpoint
from mtlsign.models.loading import initialize_pretrained
from tests.unit.models.detector_examples import cascade_architecture

ARCHITECTURE = architectures.architecture_for("resnet18", channels=3, classes=5, width=4)


def resnet(classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return architectures.build({**ARCHITECTURE, "classes": classes})


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.net."])
def test_layers_of_other_classes_stay_random(tmp_path: Path, prefix: str) -> None:
    source, target = resnet(classes=10, seed=1), resnet()
    head = target.fc.weight.clone()
    file = write(tmp_path / "w.safetensors", {prefix + n: t for n, t in source.state_dict().items()})
    loaded, count = initialize_from_checkpoint(file, target)
    assert (loaded, count) == (100, 102)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert torch.equal(target.layer4[1].bn2.running_var, source.layer4[1].bn2.running_var)
    assert torch.equal(target.fc.weight, head)


@pytest.mark.parametrize("counters", [True, False])
def test_names_of_another_library_are_taken_in_order(tmp_path: Path, counters: bool) -> None:
    source, target = resnet(seed=1), resnet()
    tensors = [t for n, t in source.state_dict().items() if counters or not n.endswith("batches_tracked")]
    torch.save({f"t{index}": t for index, t in enumerate(tensors)}, tmp_path / "w.pth")
    assert initialize_from_checkpoint(tmp_path / "w.pth", target) == (102, 102)
    assert torch.equal(target.layer4[1].bn2.bias, source.layer4[1].bn2.bias)


def test_body_of_a_detector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = architectures.build(cascade_architecture())
    source = resnet(seed=1)
    loaded, count = initialize_from_checkpoint(
        write(tmp_path / "w.safetensors", source.state_dict()), detector
    )
    assert (loaded, count) == (100, 100)
    assert torch.equal(detector.backbone.body.conv1.weight, source.conv1.weight)


def test_other_network_is_rejected_and_changes_nothing(tmp_path: Path) -> None:
    target = resnet()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    other = architectures.build({**ARCHITECTURE, "width": 8})
    with pytest.raises(ModelError, match=r"1 of the 102 tensors.*--model") as error:
        initialize_from_checkpoint(write(tmp_path / "w.safetensors", other.state_dict()), target)
    assert error.value.field == "phase1.initial-weights"
    with pytest.raises(ModelError) as error:
        initialize_from_checkpoint(tmp_path / "absent.pth", target)
    assert error.value.field == "phase1.initial-weights"
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items())


def test_phase1_starts_from_the_file(tmp_path: Path) -> None:
    source, target = resnet(seed=1), resnet()
    file = write(tmp_path / "w.safetensors", source.state_dict())
    initialize_pretrained(target, EmbedSettings.of({"phase1.initial_weights": str(file)}))
    assert torch.equal(target.fc.weight, source.fc.weight)


def test_weights_that_replace_phase1_exclude_initial_ones() -> None:
    settings = EmbedSettings.of({"phase1.initial_weights": "a.pth", "weights": "b.pth"})
    with pytest.raises(SettingsError) as error:
        settings.with_defaults()
    assert error.value.field == "phase1.initial-weights"
