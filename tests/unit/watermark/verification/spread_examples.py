"""Small networks with a spread head, for the tests of response bases, response models and detectors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.embedding.losses import readout_loss
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.response_model import ResponseModel

OWNER = Identity(bytes(range(32)), bytes(range(32, 64)))
SIDE, N = 21, 128
FACTORY = "test:network"
TAPS = ("13", "15")
#: Kernels in execution order: plain, grouped, depthwise and pointwise convolutions, two linear layers.
KERNELS = ("0.weight", "3.weight", "6.weight", "9.weight", "13.weight", "15.weight")
#: Batch norms after the convolutions.
NORMS = {"0": "1", "3": "4", "6": "7", "9": "10"}


def network(seed: int = 0) -> nn.Sequential:
    """Return a network with γ of both signs and running statistics of natural inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(64, 48), nn.ReLU()),
            nn.Linear(48, 4),
        )
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    count = module.num_features
                    signs = torch.where(torch.arange(count) % 3 == 0, -1.0, 1.0)
                    module.weight.copy_(signs * (0.5 + torch.rand(count)))
                    module.bias.normal_(0.3, 0.3)
            model.train()(images())
    return model.eval()


def images(count: int = 64, side: int = SIDE, channels: int = 1, seed: int = 1) -> Tensor:
    """Return smooth random images float32 [count, channels, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, side + 4, side + 4, generator=generator)
    return 3 * F.avg_pool2d(noise, 5, stride=1) + 0.1 * noise[:, :, 2:-2, 2:-2] + 0.5


@cache
def example_reference() -> Reference:
    """Return the reference of `network()` with the bases of all layers."""
    model = network()
    bases = response_bases(model, TAPS, images())
    return make_reference(model, (*TAPS, "2"), images(2), bases=bases)


def example_model(reference: Reference | None = None) -> ResponseModel:
    """Return the response model; the template's values are others than W0's."""
    return ResponseModel(network(9), TAPS, reference or example_reference(), images(2))


def opening(**changes: object) -> KeyOpening:
    """Return a signed opening of a spread head over `example_reference`."""
    fields: dict[str, object] = {
        "name": "spread", "nonce": "ab" * 32, "n": N, "carrier": make_carrier(N, 1, SIDE, SIDE),
        "taps": list(TAPS), "head": {"kind": "spread"}, "statistic": "count",
        "architecture": {"arch": f"custom/{FACTORY}"}, "reference": example_reference().digest,
    }  # fmt: skip
    return sign_spec(OWNER, make_spec(**(fields | changes)))


def example_detector(**changes: object) -> WatermarkDetector:
    """Return the detector of `opening`."""
    return WatermarkDetector(opening(**changes), example_reference(), factories={FACTORY: lambda: network(9)})


def mark(
    state: dict[str, Tensor], detector: WatermarkDetector, *, steps: int = 8, size: float = 0.2
) -> dict[str, Tensor]:
    """Return the state with kernels moved so that signed scores rise.

    Args:
        state: state dict of `network`.
        detector: its kernels are moved.
        steps: steps along the gradient of the margin loss.
        size: length of a step relative to each kernel.
    """
    state = dict(state)
    for _ in range(steps):
        kernels = {name: state[name].clone().requires_grad_(True) for name in detector.weight_shapes}
        scores = detector.score_kernels(detector.select_weights({**state, **kernels}), differentiable=True)
        readout_loss(detector.readouts, scores, detector.labels, 3.0).backward()
        for name, kernel in kernels.items():
            assert kernel.grad is not None
            length = size * kernel.detach().norm() / kernel.grad.norm().clamp(min=1e-12)
            state[name] = (kernel - length * kernel.grad).detach()
    return state
