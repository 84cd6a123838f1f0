from __future__ import annotations

import torch
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn

from mtlsign.models.detectors import body_of, body_stages, template_of
from tests.unit.models.detector_examples import faster_rcnn


def test_template_of_detector_is_its_body_under_the_same_names() -> None:
    detector = faster_rcnn().eval()
    template = template_of(detector)
    state, own = detector.state_dict(), template.state_dict()
    assert own and all(torch.equal(state[name], tensor) for name, tensor in own.items())
    assert {name for name in state if name.startswith("backbone.body.")} == set(own)
    assert body_stages(detector) == ("backbone.body.stage1", "backbone.body.stage2")
    assert set(template(torch.rand(1, 3, 32, 32))) == {"0", "1"}


def test_template_of_classifier_is_the_classifier() -> None:
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert template_of(classifier) is classifier
    assert body_of(classifier) is None and body_stages(classifier) == ()


def test_body_stages_knows_other_detectors_of_torchvision() -> None:
    with torch.device("meta"):
        detector = fcos_resnet50_fpn(weights=None, weights_backbone=None)
    assert body_stages(detector) == tuple(f"backbone.body.layer{k}" for k in (2, 3, 4))
