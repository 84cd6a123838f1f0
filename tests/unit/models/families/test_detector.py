from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build, build_template, default_taps
from mtlsign.models.input_spec import ImageSpec
from mtlsign.models.loading import architecture_from_settings
from tests.unit.models.detector_examples import cascade_architecture


@pytest.mark.parametrize("name", ["cascade-resnet18", "cascade-resnet34", "cascade-resnet50"])
def test_build_template_has_the_bodys_tensors_of_the_detector(name: str) -> None:
    architecture = {**cascade_architecture(), "arch": name}
    with torch.device("meta"):
        detector, template = build(architecture), build_template(architecture)
    shapes = {key: tensor.shape for key, tensor in detector.state_dict().items()}
    own = {key: tensor.shape for key, tensor in template.state_dict().items()}
    assert own == {key: shape for key, shape in shapes.items() if key.startswith("backbone.body.")}
    assert not any(isinstance(module, GeneralizedRCNN) for module in template.modules())
    assert default_taps(detector, "spread") == default_taps(template, "spread") == ("backbone.body.layer4",)


TIMM = "cascade-timm/mobilenetv3_small_050"


def timm_architecture(name: str = TIMM) -> dict[str, object]:
    return architecture_for(name, channels=3, classes=2, width=4, size=64, outputs="instances")


def test_detector_on_a_network_of_timm_detects_and_has_a_template_of_its_body() -> None:
    architecture = timm_architecture()
    assert "stem" not in architecture
    torch.manual_seed(0)
    detector, template = build(architecture).eval(), build_template(architecture)
    (result,) = detector([torch.rand(3, 48, 64)])
    assert result["masks"].shape[1:] == (1, 48, 64)
    names = {name for name in detector.state_dict() if name.startswith("backbone.body.")}
    assert set(template.state_dict()) == names
    assert default_taps(detector, "spread") == default_taps(template, "spread") == ("backbone.body.blocks.5",)
    maps = detector.backbone.body(torch.rand(1, 3, 64, 64))
    assert [own.shape[-1] for own in maps] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cascade-timm/vit_tiny_patch16_224", "strides"),
        ("cascade-timm/mobilenetv3_smal_050", "similar"),
        ("cascade-timm/hf-hub:a/b", "Unknown architecture"),
    ],
)
def test_detector_on_an_unsuitable_network_of_timm(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(timm_architecture(name))


def test_architecture_for_refuses_networks_of_other_outputs() -> None:
    with pytest.raises(ModelError, match="returns labels, and the task needs instances") as error:
        architecture_for("resnet18", channels=3, classes=2, outputs="instances")
    assert "cascade-resnet18" in str(error.value)
    with pytest.raises(ModelError, match="returns instances, and the task needs labels"):
        architecture_for("cascade-resnet18", channels=3, classes=2, size=64)
    with pytest.raises(ModelError, match="1 is not a whole number from 3 to 3"):
        architecture_for("cascade-resnet18", channels=1, classes=2, size=64, outputs="instances")


def test_architecture_from_settings_takes_the_longest_side() -> None:
    settings = EmbedSettings.of({"task": "camvid", "model": "cascade-resnet18", "width": 8}).with_defaults()
    architecture = architecture_from_settings(settings, ImageSpec(3, 180, 240, 3, outputs="instances"))
    assert (architecture["size"], architecture["classes"], architecture["width"]) == (240, 3, 8)


def test_default_settings_of_instances() -> None:
    settings = EmbedSettings.of({"task": "voc@0.5"}).with_defaults()
    assert (settings.model, settings.phase2.batch, settings.phase1.batch) == ("cascade-resnet50", 8, 8)
    assert EmbedSettings.of({"task": "voc", "phase2.batch": 3}).with_defaults().phase2.batch == 3
