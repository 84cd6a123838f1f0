"""Cascade Mask R-CNN (Cai and Vasconcelos, 2018) from the parts of torchvision's Mask R-CNN.

Three stages refine the boxes. Each is trained on the boxes of the stage before it, with a stricter overlap
(IoU) for a match. The masks are predicted by one branch, which is trained on the samples of the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

#: Smallest overlap of a box with an object for a match, weights of the box deltas, and weight of the loss.
STAGES: tuple[tuple[float, tuple[float, float, float, float], float], ...] = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)
#: Side of the features that a box is pooled to.
_POOLED = 7
#: Error of a box delta from which its loss is linear.
_BETA = 1 / 9
#: Levels of the feature pyramid.
_LEVELS = 5
_SMALLEST_BOX = 1e-2

Targets = list[dict[str, Tensor]]
Boxes = list[Tensor]


class BoxHead(nn.Module):
    """Classes and one refined box for each proposal; all classes share the box.

    Args:
        channels: channels of the feature maps.
        hidden: units of both hidden layers.
        classes: classes with the background.
    """

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers = TwoMLPHead(channels * _POOLED**2, hidden)
        self.cls_score = nn.Linear(hidden, classes)
        self.bbox_pred = nn.Linear(hidden, 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [n, classes] and box deltas [n, 4] of pooled features [n, C, 7, 7]."""
        hidden = self.layers(pooled)
        return self.cls_score(hidden), self.bbox_pred(hidden)


class CascadeHeads(RoIHeads):  # type: ignore[misc]
    """Heads of the regions of interest with a cascade of box heads.

    Args:
        heads: torchvision's heads, whose pools, samplers and mask branch are used.
        channels: channels of the feature maps.
        hidden: units of the hidden layers of each box head.
        classes: classes with the background.
    """

    def __init__(self, heads: RoIHeads, channels: int, hidden: int, classes: int) -> None:
        nn.Module.__init__(self)
        for name, value in vars(heads).items():
            if not name.startswith("_") and name not in self.__dict__:
                setattr(self, name, value)
        self.box_roi_pool = heads.box_roi_pool
        self.mask_roi_pool, self.mask_head = heads.mask_roi_pool, heads.mask_head
        self.mask_predictor = heads.mask_predictor
        self.keypoint_roi_pool = self.keypoint_head = self.keypoint_predictor = None
        self.box_heads = nn.ModuleList(BoxHead(channels, hidden, classes) for _ in STAGES)
        self._matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou, _, _ in STAGES]
        self._coders = [BoxCoder(weights) for _, weights, _ in STAGES]

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: Boxes,
        image_shapes: Sequence[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections in evaluation mode, and losses in training mode; see `RoIHeads.forward`."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets or [])
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        proposals: Boxes,
        image_shapes: Sequence[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, (_, _, weight) in enumerate(STAGES):
            # `select_training_samples` reads these two attributes, and replaces the entries of the list.
            self.proposal_matcher, self.box_coder = self._matchers[stage], self._coders[stage]
            proposals, matched, labels, deltas = self.select_training_samples(list(proposals), targets)
            if stage == 0:
                mask_loss = self._mask_loss(features, proposals, image_shapes, targets, matched, labels)
                losses["loss_mask"] = mask_loss
            logits, refined = self._stage(stage, features, proposals, image_shapes)
            y, expected = torch.cat(labels), torch.cat(deltas)
            positive = (y > 0).nonzero().flatten()
            box_loss = F.smooth_l1_loss(refined[positive], expected[positive], beta=_BETA, reduction="sum")
            losses[f"loss_classifier_{stage + 1}"] = weight * F.cross_entropy(logits, y)
            losses[f"loss_box_{stage + 1}"] = weight * box_loss / max(1, len(y))
            proposals = self._refined(stage, refined, proposals, image_shapes)
        return losses

    def _stage(
        self,
        stage: int,
        features: Mapping[str, Tensor],
        proposals: Boxes,
        image_shapes: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_heads[stage](self.box_roi_pool(features, proposals, image_shapes))
        return logits, deltas

    def _refined(
        self, stage: int, deltas: Tensor, proposals: Boxes, image_shapes: Sequence[tuple[int, int]]
    ) -> Boxes:
        """Return the boxes that a stage predicts, without gradients and inside of the images."""
        boxes = self._coders[stage].decode(deltas.detach(), proposals).squeeze(1)
        parts = boxes.split([len(own) for own in proposals])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        proposals: Boxes,
        image_shapes: Sequence[tuple[int, int]],
        targets: Targets,
        matched: Boxes,
        labels: Boxes,
    ) -> Tensor:
        """Return the loss of the masks on the proposals that match an object."""
        positive = [(own > 0).nonzero().flatten() for own in labels]
        boxes = [own[rows] for own, rows in zip(proposals, positive, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        chosen = [own[rows] for own, rows in zip(matched, positive, strict=True)]
        masks, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        loss: Tensor = maskrcnn_loss(logits, boxes, masks, classes, chosen)
        return loss

    def _mask_logits(
        self, features: Mapping[str, Tensor], boxes: Boxes, image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        return logits

    def _detections(
        self, features: Mapping[str, Tensor], proposals: Boxes, image_shapes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Return boxes, labels, scores and masks of each image; a score is the mean of the three stages."""
        probabilities = []
        for stage in range(len(STAGES)):
            logits, deltas = self._stage(stage, features, proposals, image_shapes)
            probabilities.append(logits.softmax(-1))
            proposals = self._refined(stage, deltas, proposals, image_shapes)
        scores = torch.stack(probabilities).mean(0).split([len(own) for own in proposals])
        results = [self._kept(own, boxes) for own, boxes in zip(scores, proposals, strict=True)]
        boxes, labels = [r["boxes"] for r in results], [r["labels"] for r in results]
        masks = maskrcnn_inference(self._mask_logits(features, boxes, image_shapes), labels)
        for own, result in zip(masks, results, strict=True):
            result["masks"] = own
        return results

    def _kept(self, scores: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Return the detections of one image after the threshold and the suppression of overlaps.

        Args:
            scores: probabilities [n, classes], the background first.
            boxes: [n, 4].
        """
        count = scores.shape[1] - 1
        boxes = boxes[:, None].expand(-1, count, 4).reshape(-1, 4)
        labels = torch.arange(1, count + 1, device=scores.device).repeat(len(scores))
        scores = scores[:, 1:].flatten()
        keep = (scores > self.score_thresh).nonzero().flatten()
        keep = keep[remove_small_boxes(boxes[keep], _SMALLEST_BOX)]
        order = batched_nms(boxes[keep], scores[keep], labels[keep], self.nms_thresh)
        keep = keep[order[: self.detections_per_img]]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}


def cascade_mask_rcnn(backbone: nn.Module, *, classes: int, size: int) -> MaskRCNN:
    """Return Cascade Mask R-CNN with random weights.

    Args:
        backbone: a body with a feature pyramid of five levels and the attribute `out_channels`.
        classes: classes without the background.
        size: longest side in pixels to which images are scaled; the anchors follow from it.
    """
    channels = int(backbone.out_channels)  # type: ignore[arg-type]
    smallest = max(4, size // 32)
    anchors = AnchorGenerator(
        tuple((smallest * 2**level,) for level in range(_LEVELS)), ((0.5, 1.0, 2.0),) * _LEVELS
    )
    options: dict[str, Any] = {
        "rpn_pre_nms_top_n_train": 1000, "rpn_post_nms_top_n_train": 500,
        "rpn_pre_nms_top_n_test": 500, "rpn_post_nms_top_n_test": 200,
        "rpn_batch_size_per_image": 128, "box_batch_size_per_image": 128,
    }  # fmt: skip
    network = MaskRCNN(
        backbone,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=anchors,
        box_head=nn.Identity(),
        box_predictor=nn.Identity(),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
        **options,
    )
    network.roi_heads = CascadeHeads(network.roi_heads, channels, 4 * channels, classes + 1)
    return network
