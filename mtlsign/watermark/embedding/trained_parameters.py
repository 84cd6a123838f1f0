"""Parameters that phase 2 trains, and their optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.config.embed import EmbedSettings
from mtlsign.watermark.embedding.loop import require_set
from mtlsign.watermark.embedding.low_rank import LowRankTraining
from mtlsign.watermark.verification.detector import WatermarkDetector


def phase2_optimizer(
    trained: Mapping[str, nn.Parameter],
    head: Sequence[Tensor],
    detector: WatermarkDetector,
    settings: EmbedSettings,
    low_rank: LowRankTraining | None,
) -> torch.optim.Optimizer:
    """Return Adam with two groups: watermarked parameters and the head, then all other parameters.

    Args:
        trained: parameters that phase 2 changes, by name.
        head: parameters of a free head.
        detector: the owner's detector.
        settings: complete settings.
        low_rank: factors that are trained in place of `trained`; None if there are none.
    """
    watermarked_parameters: list[Tensor] = []
    other_parameters: list[Tensor] = []
    for name, parameter in trained.items():
        in_taps = name in detector.weight_shapes
        optimized = [parameter] if low_rank is None else low_rank.factors(name)
        (watermarked_parameters if in_taps else other_parameters).extend(optimized)
    groups = [
        {"params": [*watermarked_parameters, *head], "scale": 1.0},
        {"params": other_parameters, "scale": settings.phase2.other_layers_lr_scale},
    ]
    return torch.optim.Adam(groups, lr=require_set(settings.phase2.lr), fused=True)


def freeze_fixed_layers(model: nn.Module, detector: WatermarkDetector) -> dict[str, nn.Parameter]:
    """Freeze batch norms' weights and biases, and embeddings; return the other parameters by name.

    A reference holds vectors of an embedding and of the sources of a transformer's residual stream, which
    must not change after it is made.
    """
    fixed = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm | nn.Embedding)
        for part in ("weight", "bias")
    } | set(detector.aligner.further_shapes)
    trained = {}
    for name, parameter in model.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
        else:
            trained[name] = parameter
    return trained
