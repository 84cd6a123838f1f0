"""Architectures of the table: small networks of the vision libraries, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.tasks.outputs import LogitsFunction, default_logits

CLASSES = 5


@dataclass(frozen=True)
class Entry:
    """Architecture of the table.

    Attributes:
        build: builds the network with random weights.
        side: image height and width in pixels.
        logits_of: selects logits [n, classes] from the outputs; None for the default.
        refusal: words of the expected refusal; None if the network is supported.
    """

    build: Callable[[], nn.Module]
    side: int = 32
    logits_of: LogitsFunction | None = None
    refusal: str | None = None


def pooled(outputs: Any) -> Tensor:
    """Return the mean of dense logits [n, K, H, W] over their positions."""
    return default_logits(outputs).mean((2, 3))


class Classifier(nn.Module):
    """Linear classifier on the features that a body returns as a tensor or as levels of a pyramid."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the mean features of the finest level."""
        features = self.body(x)
        if isinstance(features, dict):
            features = next(iter(features.values()))
        while features.ndim > 2:
            features = features.mean(-1)
        logits: Tensor = self.head(features)
        return logits


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    network: nn.Module = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return network


def _segmentation(name: str) -> nn.Module:
    return _torchvision(name, weights_backbone=None)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return network


def _transformers(name: str, model: str = "ForImageClassification", **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    network: nn.Module = getattr(transformers, name + model)(config)
    return network


def _bottleneck_resnet(**options: Any) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, **options)


def _vgg(batch_norm: bool) -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    with torch.device("meta"):
        network = VGG(make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M"], batch_norm), CLASSES)
    network.classifier = nn.Linear(64 * 7 * 7, CLASSES)
    network.features = make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M"], batch_norm)
    return network


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=CLASSES)


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=CLASSES)


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES)


def _smp(name: str, encoder: str = "resnet18") -> nn.Module:
    import segmentation_models_pytorch as smp

    network: nn.Module = getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES)
    return network


def _monai(name: str, **options: Any) -> nn.Module:
    from monai.networks import nets

    network: nn.Module = getattr(nets, name)(**options)
    return network


def _open_clip_resnet() -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    return Classifier(ModifiedResNet([1, 1, 1, 1], 64, 4, image_size=64, width=16), 64)


def _open_clip_transformer() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return Classifier(VisionTransformer(32, 8, 64, 3, 4, 2.0, output_dim=32), 32)


def _frozen_body(name: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d

    body = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=FrozenBatchNorm2d)
    for buffer_name, buffer in body.named_buffers():  # values as after training
        if buffer_name.endswith("var"):
            buffer.uniform_(0.5, 2)
        elif buffer_name.endswith("weight"):
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(0, 0.2)
    return Classifier(body, 256)


def _ssd_body() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    return Classifier(network.backbone, 672)


def _detector() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)


#: torchvision: name of the model -> side and options.
_TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_y_400mf": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (32, {}),
    "mnasnet0_5": (32, {}),
    "googlenet": (64, {"init_weights": False, "aux_logits": False}),
}
#: timm: name of the model -> side and options.
_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18d": (32, {}),
    "seresnet18": (32, {}),
    "test_resnet": (32, {}),
    "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 4}),
    "deit_tiny_patch16_224": (32, {"img_size": 32, "depth": 4}),
    "swin_tiny_patch4_window7_224": (
        32,
        {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "mixer_s32_224": (64, {"img_size": 64}),
    "test_nfnet": (32, {}),
    "regnety_002": (32, {}),
    "repvgg_a0": (32, {}),
    "mobilenetv4_conv_small": (32, {}),
    "ghostnet_050": (32, {}),
    "hrnet_w18_small": (64, {}),
    "dla46_c": (32, {}),
    "pvt_v2_b0": (32, {}),
    "poolformer_s12": (32, {}),
    "edgenext_xx_small": (32, {}),
}
#: The last stage of this network returns a list, so that a tap has to be named.
_TIMM_REFUSALS = {"hrnet_w18_small": "Tap another module"}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
_PATCHES = {"image_size": 32, "patch_size": 8}
#: transformers: name of the configuration -> its options.
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "RegNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
    "ConvNext": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
    "ViT": _SMALL | _PATCHES,
    "DeiT": _SMALL | _PATCHES,
    "Beit": _SMALL | _PATCHES,
    "Swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "Segformer": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    "PoolFormer": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
}
_UNET = {"spatial_dims": 2, "in_channels": 3, "out_channels": CLASSES}

ZOO: dict[str, Entry] = {
    **{f"torchvision/{n}": Entry(partial(_torchvision, n, **o), s) for n, (s, o) in _TORCHVISION.items()},
    "torchvision/ResNet_bottleneck": Entry(_bottleneck_resnet),
    "torchvision/ResNeXt": Entry(partial(_bottleneck_resnet, groups=8, width_per_group=8)),
    "torchvision/VGG": Entry(partial(_vgg, False)),
    "torchvision/VGG_bn": Entry(partial(_vgg, True)),
    "torchvision/ConvNeXt": Entry(_convnext),
    "torchvision/SwinTransformer": Entry(_swin),
    "torchvision/VisionTransformer": Entry(_vision_transformer),
    "torchvision/MaxVit": Entry(_maxvit, 64),
    "torchvision/deeplabv3_mobilenet": Entry(
        partial(_segmentation, "deeplabv3_mobilenet_v3_large"), 64, pooled
    ),
    "torchvision/lraspp_mobilenet": Entry(partial(_segmentation, "lraspp_mobilenet_v3_large"), 64, pooled),
    "torchvision/frozen_resnet18_fpn_body": Entry(partial(_frozen_body, "resnet18"), 64),
    "torchvision/ssdlite_body": Entry(_ssd_body, 64),
    "torchvision/ssdlite": Entry(_detector, 64, None, "logits_of"),
    **{
        f"timm/{n}": Entry(partial(_timm, n, **o), s, refusal=_TIMM_REFUSALS.get(n))
        for n, (s, o) in _TIMM.items()
    },
    **{f"transformers/{n}": Entry(partial(_transformers, n, **o)) for n, o in _TRANSFORMERS.items()},
    "transformers/Bert": Entry(
        partial(_transformers, "Bert", "ForSequenceClassification", **_SMALL), 32, None, "cannot read images"
    ),
    "smp/Unet": Entry(partial(_smp, "Unet"), 32, pooled),
    "smp/FPN": Entry(partial(_smp, "FPN"), 64, pooled),
    "smp/DeepLabV3Plus": Entry(partial(_smp, "DeepLabV3Plus", "mobilenet_v2"), 64, pooled),
    "monai/UNet": Entry(
        partial(_monai, "UNet", **_UNET, channels=(8, 16, 32), strides=(2, 2), num_res_units=1), 32, pooled
    ),
    "monai/DenseNet": Entry(
        partial(_monai, "DenseNet", **_UNET, init_features=16, growth_rate=8, block_config=(2, 2, 2)), 32
    ),
    "monai/SegResNet": Entry(partial(_monai, "SegResNet", **_UNET, init_filters=8), 32, pooled),
    "open_clip/ModifiedResNet": Entry(_open_clip_resnet, 64),
    "open_clip/VisionTransformer": Entry(_open_clip_transformer),
}
