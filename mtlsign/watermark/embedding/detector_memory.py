"""Numbers of activations that one image needs in a detector of torchvision's form, on the meta device.

A detector computes its proposals from values, so that it cannot run as a whole without them. Its parts can:
the body with its pyramid, the head of the proposals on every level, and the heads of the regions on as many
regions as training samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from mtlsign.models.cascade_mask_rcnn import CascadeHeads
from mtlsign.models.input_spec import ImageSpec

#: Multiple of pixels to which torchvision pads a batch.
_PADDING = 32
#: Values of one anchor on its way to a proposal: shape, deltas, box, score, overlap with each object.
_ANCHOR_VALUES = 32
#: Side of the features of a region, for boxes and for masks.
_BOX_SIDE, _MASK_SIDE = 7, 14


class _Recorder(Protocol):
    def __call__(self, network: nn.Module, run: Callable[[], object], /) -> int: ...


def is_two_stage_detector(network: nn.Module) -> bool:
    """Return whether a network has torchvision's parts: backbone, proposals and heads of regions."""
    return isinstance(network, GeneralizedRCNN)


def detector_values(network: nn.Module, input_spec: ImageSpec, record: _Recorder) -> int:
    """Return how many numbers autograd keeps for one image.

    Args:
        network: detector on the meta device.
        input_spec: images of the task.
        record: runs a function and returns the numbers that the modules of a network add.

    Returns:
        Numbers of the outputs of body, pyramid, proposals and heads of one image.
    """
    assert isinstance(network, GeneralizedRCNN)
    height, width = (-(-side // _PADDING) * _PADDING for side in (input_spec.height, input_spec.width))
    images = torch.empty(2, input_spec.channels, height, width, device="meta")
    levels: dict[str, Tensor] = {}

    def run_backbone() -> None:
        output = network.backbone(images)
        levels.update(output if isinstance(output, Mapping) else {"0": output})

    total = record(network.backbone, run_backbone)
    features = list(levels.values())
    total += record(network.rpn.head, lambda: network.rpn.head(features))
    anchors: int = sum(network.rpn.head.cls_logits(level).numel() for level in features)
    return (total + _ANCHOR_VALUES * anchors) // 2 + _region_values(network.roi_heads, features[0], record)


def _region_values(heads: Any, level: Tensor, record: _Recorder) -> int:
    """Return the numbers that the heads of regions keep for the regions sampled from one image."""
    sampler = heads.fg_bg_sampler
    regions, positive = (
        sampler.batch_size_per_image,
        round(sampler.batch_size_per_image * sampler.positive_fraction),
    )
    pooled = torch.empty(regions, level.shape[1], _BOX_SIDE, _BOX_SIDE, device="meta")
    box_heads = heads.box_heads if isinstance(heads, CascadeHeads) else [heads.box_head]
    total = sum(pooled.numel() + record(head, partial(head, pooled)) for head in box_heads)
    if heads.mask_predictor is None:
        return total
    masks = torch.empty(positive, level.shape[1], _MASK_SIDE, _MASK_SIDE, device="meta")
    branch = nn.Sequential(heads.mask_head, heads.mask_predictor)
    return total + masks.numel() + record(branch, lambda: branch(masks))
