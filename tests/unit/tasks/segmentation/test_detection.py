from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.errors import DataError
from mtlsign.tasks import Batch
from mtlsign.tasks.segmentation.detection import (
    detection_loss,
    detections,
    feature_vectors,
    training_outputs,
)
from tests.unit.models.detector_examples import faster_rcnn, objects


@pytest.fixture
def batch() -> Batch:
    """Return two images with their targets."""
    samples = [objects(seed) for seed in range(2)]
    return Batch(torch.stack([x for x, _ in samples]), [y for _, y in samples])


def test_training_outputs_in_evaluation_mode_has_losses_and_keeps_modes(batch: Batch) -> None:
    detector = faster_rcnn().eval()
    before = detector.backbone.body.norm1.running_mean.clone()
    outputs = training_outputs(detector, batch)
    loss = detection_loss(outputs, batch.targets)
    loss.backward()
    assert float(loss.detach()) > 0 and detector.backbone.body.conv1.weight.grad is not None
    assert not any(module.training for module in detector.modules())
    torch.testing.assert_close(detector.backbone.body.norm1.running_mean, before)


def test_training_outputs_of_teacher_has_the_same_features_without_losses(batch: Batch) -> None:
    detector = faster_rcnn().eval()
    student = feature_vectors(training_outputs(detector, batch))
    with torch.no_grad():
        outputs = training_outputs(detector, batch)
    assert outputs["losses"] == {}
    torch.testing.assert_close(feature_vectors(outputs), student)
    sizes = [x[0].numel() for x in outputs["features"]]
    assert student.shape == (2, sum(sizes)) and len(sizes) == 3


def test_training_outputs_of_several_scales_takes_that_of_evaluation(batch: Batch) -> None:
    detector = faster_rcnn().eval()
    detector.transform.min_size, detector.transform.max_size = (32, 96, 64), 200
    shapes = {tuple(training_outputs(detector, batch)["features"][0].shape) for _ in range(4)}
    assert shapes == {(2, 16, 16, 16)}


def test_feature_vectors_counts_every_map_the_same() -> None:
    maps = [torch.ones(1, 2, 8, 8), 3 * torch.ones(1, 2, 2, 2)]
    assert float(feature_vectors({"features": maps}).square().sum()) == pytest.approx(1 + 9)


def test_training_outputs_leaves_out_crowd(batch: Batch) -> None:
    class Recorder(nn.Module):
        def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> object:
            self.targets = targets
            return {"loss": images[0].sum()}

    detector = Recorder()
    crowd = [{**target, "iscrowd": torch.tensor([True, False])} for target in batch.targets]
    training_outputs(detector, Batch(batch.inputs, crowd))
    assert [target["labels"].tolist() for target in detector.targets] == [[2], [2]]
    assert detector.targets[0]["masks"].shape == (1, 64, 64)


def test_training_outputs_of_other_networks_names_the_fix(batch: Batch) -> None:
    class Classifier(nn.Module):
        def forward(self, images: object, targets: object) -> torch.Tensor:
            return torch.zeros(2)

    with pytest.raises(DataError, match="must return a mapping of losses"):
        training_outputs(Classifier(), batch)
    with pytest.raises(DataError, match="no module 'backbone'"):
        feature_vectors({"features": []})
    with pytest.raises(DataError, match="returned no loss"):
        detection_loss({"losses": {}}, [])


def test_detections_has_a_mapping_for_each_image(batch: Batch) -> None:
    results = detections(faster_rcnn().eval(), batch)
    assert [set(result) for result in results] == [{"boxes", "labels", "scores"}] * 2
