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
