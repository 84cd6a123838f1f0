"""Mixed channels of linear bottlenecks: the function stays, and the marks of their kernels are lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.equal_function import TOLERANCE
from mtlsign.tasks import Task
from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.keys.opening import sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from tests.unit.attacks.helpers import changed_parameters, difference, flat_network, network, run
from tests.unit.watermark.verification.spread_examples import OWNER, images, mark

SIDE, N = 24, 512
FACTORY = "test:mobilenet"
#: Kernels that write or read channels without an activation.
NARROW = {"first.conv.2.weight", "second.conv.2.weight", "second.conv.0.0.weight", "last.0.weight"}


class Mobile(nn.Module):
    """Two inverted residual blocks of torchvision, the second one with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.first, self.second = InvertedResidual(8, 12, 1, 4), InvertedResidual(12, 12, 1, 4)
        self.last = nn.Sequential(nn.Conv2d(12, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.second(self.first(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mobile()
        model.train()(images(side=SIDE))
        return model.eval()


@pytest.fixture(scope="module")
def detector(mobile: nn.Module) -> WatermarkDetector:
    taps, inputs = ["fc"], images(side=SIDE)
    reference = make_reference(mobile, taps, inputs[:2], bases=response_bases(mobile, taps, inputs))
    spec = make_spec(
        name="mobile", nonce="cd" * 32, n=N, carrier=make_carrier(N, 1, SIDE, SIDE), taps=taps,
        head={"kind": "spread"}, statistic="count", architecture={"arch": f"custom/{FACTORY}"},
        reference=reference.digest,
    )  # fmt: skip
    return WatermarkDetector(sign_spec(OWNER, spec), reference, factories={FACTORY: Mobile})


def test_mix_preserves_the_function_and_changes_narrow_kernels_alone(
    mobile: nn.Module, tiny_task: Task
) -> None:
    outcome = run("mix_linear_channels", mobile, tiny_task)
    assert difference(mobile, outcome) < TOLERANCE
    changed = changed_parameters(mobile, outcome.model)
    assert {name for name in changed if mobile.get_parameter(name).dim() > 1} == NARROW


def test_mix_of_networks_with_activations_is_not_applicable(tiny_task: Task, module: nn.Module) -> None:
    for model in (module, network("grouped"), flat_network()):
        with pytest.raises(NotApplicableError):
            run("mix_linear_channels", model, tiny_task)


def test_mix_loses_the_mark_of_narrow_kernels(
    mobile: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    marked = Mobile()
    state = {name: tensor.clone() for name, tensor in mobile.state_dict().items()}
    marked.load_state_dict(mark(state, detector, steps=10, size=0.05))
    before = verify(marked.eval().state_dict(), detector)
    mixed = verify(run("mix_linear_channels", marked, tiny_task).model.state_dict(), detector)
    assert before.accepted and not mixed.accepted and mixed.evidence_bits < before.evidence_bits / 2
