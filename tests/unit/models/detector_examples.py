"""Tiny detectors and their data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from mtlsign.models.architectures import architecture_for

SIDE = 64


def cascade_architecture(width: int = 4) -> dict[str, object]:
    """Return the architecture of a small Cascade Mask R-CNN for two classes."""
    return architecture_for(
        "cascade-resnet18", channels=3, classes=2, width=width, size=SIDE, outputs="instances"
    )


def objects(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image [3, 64, 64] of a red and a green object, and its target."""
    gen = torch.Generator().manual_seed(seed)
    corners = torch.randint(2, 14, (2, 2), generator=gen) + torch.tensor([[0, 0], [30, 30]])
    boxes = torch.cat([corners, corners + 18], 1)
    image, masks = 0.2 * torch.rand(3, SIDE, SIDE, generator=gen), torch.zeros(2, SIDE, SIDE).byte()
    for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
        image[index, top:bottom, left:right] += 0.7
        masks[index, top:bottom, left:right] = 1
    return image, {"boxes": boxes.float(), "labels": torch.tensor([1, 2]), "masks": masks}


class Objects(Dataset[Any]):
    """Samples of `objects`, as a user's dataset of a detector returns them."""

    def __init__(self, count: int, offset: int = 0) -> None:
        self._count, self._offset = count, offset

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return objects(self._offset + index)


class Body(nn.Module):
    """Two stages with batch norms."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8)
        self.stage1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), norm(32), nn.ReLU())


def faster_rcnn(norm: Any = nn.BatchNorm2d) -> FasterRCNN:
    """Return a user's own detector: Faster R-CNN on a body of three convolutions."""
    backbone = BackboneWithFPN(Body(norm), {"stage1": "0", "stage2": "1"}, [16, 32], 16)
    assert isinstance(backbone.body, IntermediateLayerGetter)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FasterRCNN(
        backbone, 3, min_size=SIDE, max_size=SIDE, rpn_anchor_generator=anchors, box_batch_size_per_image=32,
        rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20,
    )  # fmt: skip


def frozen_norm(channels: int) -> FrozenBatchNorm2d:
    """Return a frozen batch norm with drawn values."""
    norm = FrozenBatchNorm2d(channels)
    for name, buffer in norm.named_buffers():
        buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.uniform_(-0.5, 1.5)
    return norm


def frozen_faster_rcnn() -> FasterRCNN:
    """Return the user's detector with frozen batch norms."""
    return faster_rcnn(frozen_norm)
