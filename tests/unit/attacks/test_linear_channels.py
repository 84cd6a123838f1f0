"""Mixed channels of linear bottlenecks: the function stays, and so does the mark of products."""

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


def new_mobile(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mobile()
        with torch.no_grad():
            for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
                signs = torch.where(torch.arange(norm.num_features) % 3 == 0, -1.0, 1.0)
                norm.weight.copy_(signs * (0.4 + 1.2 * torch.rand(norm.num_features)))
        model.train()(images(side=SIDE))
        return model.eval()


def detector_of(model: nn.Module, nonce: str = "cd" * 32) -> WatermarkDetector:
    taps, inputs = ["fc"], images(side=SIDE)
    reference = make_reference(model, taps, inputs[:2], bases=response_bases(model, taps, inputs))
    spec = make_spec(
        name="mobile", nonce=nonce, n=N, carrier=make_carrier(N, 1, SIDE, SIDE), taps=taps,
        head={"kind": "spread"}, statistic="count", architecture={"arch": f"custom/{FACTORY}"},
        reference=reference.digest,
    )  # fmt: skip
    return WatermarkDetector(sign_spec(OWNER, spec), reference, factories={FACTORY: Mobile})


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    return new_mobile()


@pytest.fixture(scope="module")
def detector(mobile: nn.Module) -> WatermarkDetector:
    return detector_of(mobile)


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


@pytest.fixture(scope="module")
def marked(mobile: nn.Module, detector: WatermarkDetector) -> nn.Module:
    return marked_copy(mobile, detector)


def marked_copy(mobile: nn.Module, detector: WatermarkDetector) -> nn.Module:
    model = Mobile()
    state = {name: tensor.clone() for name, tensor in mobile.state_dict().items()}
    model.load_state_dict(mark(state, detector, steps=10, size=0.04))
    return model.eval()


def matches(model: nn.Module, detector: WatermarkDetector) -> int:
    return verify(model.state_dict(), detector).matches


@pytest.mark.parametrize("mark_seed", [0, 1])
def test_mix_keeps_the_mark_of_products(mark_seed: int, tiny_task: Task) -> None:
    mobile = new_mobile(mark_seed)
    detector = detector_of(mobile, nonce=f"{mark_seed:02x}" * 32)
    marked = marked_copy(mobile, detector)
    before = matches(marked, detector)
    assert before > 0.8 * N and abs(matches(mobile, detector) - N / 2) < 4 * (N / 4) ** 0.5
    for seed in (0, 1):
        mixed = run("mix_linear_channels", marked, tiny_task, seed).model
        assert abs(matches(mixed, detector) - before) <= 0.02 * N
    scaled = run("mix_linear_channels+scale_filters+scale_inner_channels", marked, tiny_task).model
    assert abs(matches(scaled, detector) - before) <= 0.02 * N
    folded = matches(run("bn_fold:decoys=signs", marked, tiny_task).model, detector)
    mixed = run("mix_linear_channels+bn_fold:decoys=signs", marked, tiny_task).model
    assert abs(matches(mixed, detector) - folded) <= 0.02 * N and folded > 0.85 * N


@pytest.mark.parametrize("text", ["", "+bn_fold:decoys=signs", "+ftal:epochs=1"])
def test_mix_adds_no_loss_to_other_attacks(
    text: str, marked: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    without = run(f"permute_channels{text}", marked, tiny_task).model
    mixed = run(f"mix_linear_channels+permute_channels{text}", marked, tiny_task).model
    assert matches(mixed, detector) >= matches(without, detector) - 0.02 * N > 0.75 * N


def test_random_keys_match_half_of_the_bits_of_a_mixed_network(
    marked: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    mixed = run("mix_linear_channels", marked, tiny_task).model.state_dict()
    accuracies = verify(mixed, detector, controls=8).controls["wrong_keys"]
    assert all(abs(accuracy - 0.5) < 4 * 0.5 / N**0.5 for accuracy in accuracies)


def test_mix_loses_the_mark_of_narrow_kernels_under_a_reference_without_products(
    mobile: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.watermark.verification.response_bases.found_products", lambda *_: [])
    detector = detector_of(mobile)
    assert "second.conv.0.0.weight" in detector.kernel_shapes
    marked = marked_copy(mobile, detector)
    before = verify(marked.state_dict(), detector)
    mixed = verify(run("mix_linear_channels", marked, tiny_task).model.state_dict(), detector)
    assert before.accepted and mixed.evidence_bits < before.evidence_bits / 2
