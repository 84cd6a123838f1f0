"""Small Swin transformers of timm and torchvision for images of 24 x 24 pixels with one channel."""

from __future__ import annotations

import torch
from torch import nn

#: Widths of the two stages.
WIDTHS = (16, 32)


def timm_swin(seed: int = 0) -> nn.Module:
    """Return a network of two stages with shifted windows, with norms and tables as after training."""
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(seed)
    model = SwinTransformer(
        img_size=24, patch_size=3, window_size=4, in_chans=1, num_classes=4, drop_path_rate=0.0,
        embed_dim=WIDTHS[0], depths=(2, 2), num_heads=(2, 2),
    )  # fmt: skip
    return _as_trained(model)


def torchvision_swin(seed: int = 0) -> nn.Module:
    """Return the network of `timm_swin` as torchvision builds it."""
    from torchvision.models import SwinTransformer

    torch.manual_seed(seed)
    model = SwinTransformer(
        [3, 3], WIDTHS[0], [2, 2], [2, 2], [4, 4], num_classes=4, stochastic_depth_prob=0.0
    )
    model.features[0][0] = nn.Conv2d(1, WIDTHS[0], 3, 3)  # type: ignore[index, operator]
    return _as_trained(model)


def _as_trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif name.endswith("relative_position_bias_table"):
                parameter.add_(torch.randn(parameter.shape))
    return model.eval()
