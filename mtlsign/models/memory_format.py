"""Memory format of convolutional networks on CPUs."""

from __future__ import annotations

import torch
from torch import nn

_VECTOR = 8


def memory_format_for(model: nn.Module) -> torch.memory_format:
    """Return the memory format in which to run `model`.

    Channels-last is the faster format on CPUs. oneDNN 3.13 (torch 2.15) writes outside its buffers in the
    weight gradient of a strided 1x1 convolution whose input channels are no multiple of 8, on CPUs with AVX2
    but without AVX-512. The choice depends on the network alone, so that every machine trains in the same
    format.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and max(module.stride) > 1
            and set(module.kernel_size) == {1}
            and (module.in_channels // module.groups) % _VECTOR
        ):
            return torch.contiguous_format
    return torch.channels_last
