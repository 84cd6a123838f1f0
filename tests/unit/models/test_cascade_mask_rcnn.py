from __future__ import annotations

import pytest
import torch

from mtlsign.models.architectures import build
from mtlsign.models.cascade_mask_rcnn import STAGES, CascadeHeads
from tests.unit.models.detector_examples import SIDE, cascade_architecture, objects


def test_cascade_losses_reach_all_parameters() -> None:
    torch.manual_seed(0)
    detector = build(cascade_architecture()).train()
    image, target = objects(0)
    empty = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, SIDE, SIDE, dtype=torch.uint8),
    }  # fmt: skip
    losses = detector([image, image], [target, empty])
    expected = {f"loss_{kind}_{k + 1}" for kind in ("classifier", "box") for k in range(len(STAGES))}
    assert set(losses) == expected | {"loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None]
    assert without == []


@pytest.fixture
def heads() -> CascadeHeads:
    """Return heads whose stages predict constant shifts to the right and constant probabilities."""
    detector = build(cascade_architecture()).eval()
    for stage, head in enumerate(detector.roi_heads.box_heads):  # type: ignore[union-attr]
        for layer in (head.cls_score, head.bbox_pred):
            torch.nn.init.zeros_(layer.weight)
        head.bbox_pred.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])
        head.cls_score.bias.data = torch.tensor([0.0, float(stage), -9.0])
    assert isinstance(detector.roi_heads, CascadeHeads)
    return detector.roi_heads


@torch.no_grad()
def test_cascade_refines_boxes_with_the_weights_of_each_stage(heads: CascadeHeads) -> None:
    features = {str(k): torch.rand(1, 16, 16 >> k, 16 >> k) for k in range(4)}
    boxes = torch.tensor([[4.0, 4.0, 24.0, 24.0]])
    (result,), losses = heads(features, [boxes], [(SIDE, SIDE)])
    shift = 20 * (1 / 10 + 1 / 20 + 1 / 30)
    torch.testing.assert_close(result["boxes"], boxes + torch.tensor([[shift, 0.0, shift, 0.0]]))
    means = torch.stack([torch.tensor([0.0, float(k), -9.0]).softmax(0) for k in range(3)]).mean(0)
    torch.testing.assert_close(result["scores"], means[1:2])
    assert result["labels"].tolist() == [1] and result["masks"].shape[:2] == (1, 1)
    assert losses == {}


@torch.no_grad()
def test_cascade_suppresses_overlaps_of_one_class_alone(heads: CascadeHeads) -> None:
    boxes = torch.tensor([[4.0, 4, 24, 24], [5, 4, 25, 24], [30, 30, 50, 50]])
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.7, 0.2], [0.99, 0.005, 0.005]])
    result = heads._kept(scores, boxes)
    assert result["labels"].tolist() == [1, 2]
    torch.testing.assert_close(result["scores"], torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(result["boxes"], boxes[[1, 0]])


@pytest.mark.slow
def test_cascade_detects_objects_that_it_was_trained_on() -> None:
    torch.manual_seed(0)
    detector = build(cascade_architecture(8)).train()
    samples = [objects(seed) for seed in range(2)]
    optimizer = torch.optim.Adam(detector.parameters(), lr=3e-3)
    for _ in range(80):
        losses = detector([x for x, _ in samples], [dict(y) for _, y in samples])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    image, target = samples[0]
    with torch.no_grad():
        (result,) = detector.eval()([image])
    for label in (1, 2):
        best = (result["labels"] == label).nonzero().flatten()[0]
        truth = target["masks"][label - 1].bool()
        mask = result["masks"][best, 0] > 0.5
        assert float((mask & truth).sum() / (mask | truth).sum()) > 0.6
