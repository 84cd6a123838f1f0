"""Small generative adversarial network for images, after Radford et al. 2016 (arXiv 1511.06434).

Nearest-neighbour upsampling and 3x3 convolutions take the place of transposed convolutions. Attacks and
schemes therefore find the layers that they act on in other networks. The network holds generator and
discriminator, because an attacker who tunes a generator needs both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mtlsign.errors import ModelError

#: Numbers of a latent vector.
LATENT = 64
#: Prefix of the generator's tensors.
GENERATOR = "generator"
_SMALLEST_SIDE, _MAX_STAGES = 4, 3


def image_side(channels: int, values: int) -> int:
    """Return the side of square images. Raises `ModelError` unless their values are square and even.

    Args:
        channels: channels of an image.
        values: values of an image, over all channels.
    """
    side = math.isqrt(max(1, values // channels))
    if channels * side * side != values or side % 4 or side < 2 * _SMALLEST_SIDE:
        raise ModelError(
            f"The generator makes square images whose side is a multiple of 4 from 8 upwards, not {values} "
            f"values in {channels} channels. Use another task.",
            field="classes",
        )
    return side


def _stage_count(side: int) -> int:
    """Return the number of times that the side is halved."""
    count = 0
    while count < _MAX_STAGES and side % 2 == 0 and side // 2 >= _SMALLEST_SIDE:
        side, count = side // 2, count + 1
    return count


class Generator(nn.Module):
    """Projection of the latent vector, then stages of upsampling, convolution, batch norm and ReLU."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        stages = _stage_count(side)
        widths = [width * 2 ** (stages - 1 - index) for index in range(stages)]
        self.start_side, first = side // 2**stages, widths[0]
        self.project = nn.Conv2d(LATENT, first * self.start_side**2, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(first)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for before, after in zip(widths, [*widths[1:], width], strict=True):
            self.convs.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(after))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images from -1 to 1, [n, C, H, W], of latent vectors [n, LATENT]."""
        x = self.project(latents[:, :, None, None])
        x = F.relu(self.first_norm(x.reshape(len(x), -1, self.start_side, self.start_side)))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))))
        return torch.tanh(self.last(x))


class Discriminator(nn.Module):
    """Convolutions of stride 2 with leaky ReLU and no batch norm; one logit for each image."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        stages = _stage_count(side)
        for index in range(stages):
            layers += [nn.Conv2d(channels, width * 2**index, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels = width * 2**index
        layers.append(nn.Conv2d(channels, 1, side // 2**stages))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n] of images [n, C, H, W]; a positive one means a real image."""
        return self.layers(images).flatten()  # type: ignore[no-any-return]


class DCGAN(nn.Module):
    """Generator with its discriminator.

    Args:
        channels: channels of the images.
        classes: values of an image, channels x side x side.
        width: channels of the generator's last stage and of the discriminator's first.
    """

    def __init__(self, *, channels: int, classes: int, width: int) -> None:
        super().__init__()
        side = image_side(channels, classes)
        # The generator is the last part, because attacks take the last layers for those of the outputs.
        self.discriminator = Discriminator(channels, side, width)
        self.generator = Generator(channels, side, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, latents: Tensor, real: Tensor | None = None) -> Tensor | Mapping[str, Tensor]:
        """Generate images, or compute everything that the training losses read.

        Args:
            latents: float32 [n, LATENT].
            real: real images from -1 to 1, [n, C, H, W]; None to generate alone.

        Returns:
            Images [n, C, H, W]; with real images, a mapping with `images` and three rows of logits [n]:
            `real` and `generated` train the discriminator alone, and `convinced` the generator alone.
        """
        images: Tensor = self.generator(latents)
        if real is None:
            return images
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return {
            "images": images,
            "real": self.discriminator(real),
            "generated": self.discriminator(images.detach()),
            "convinced": functional_call(self.discriminator, fixed, (images,)),
        }
