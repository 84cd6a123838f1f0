"""Mixed channels of linear bottlenecks: the function stays, and the verifier undoes the mix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.equal_function import TOLERANCE, function_change
from mtlsign.tasks import Task
from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.keys.opening import sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.alignment import Aligner
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.evidence import binomial_evidence_bits
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.scores import matching_bits
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


@pytest.fixture(scope="module")
def marked(mobile: nn.Module, detector: WatermarkDetector) -> nn.Module:
    model = Mobile()
    state = {name: tensor.clone() for name, tensor in mobile.state_dict().items()}
    model.load_state_dict(mark(state, detector, steps=10, size=0.05))
    return model.eval()


def kernels_of(model: nn.Module, detector: WatermarkDetector) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() for name in detector.weight_shapes}


def flipped(model: nn.Module) -> nn.Module:
    """Return the network with factors of random sign on all rows of narrow kernels, and in their norms."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in ("first", "second"):
            conv, norm = changed.get_submodule(f"{block}.conv.2"), changed.get_submodule(f"{block}.conv.3")
            signs = torch.where(torch.rand(12, generator=generator) < 0.5, -1.0, 1.0)
            factors = signs * (0.5 + torch.rand(12, generator=generator))
            conv.weight.mul_(factors[:, None, None, None])  # type: ignore[operator,union-attr]
            for name in ("running_mean", "running_var", "weight"):
                change = {"running_mean": factors, "running_var": factors**2, "weight": signs}[name]
                norm.get_parameter(name).mul_(change) if name == "weight" else norm.get_buffer(name).mul_(
                    change
                )
    return changed


@pytest.mark.parametrize(
    "attacks",
    [
        "mix_linear_channels",
        "mix_linear_channels+permute_channels",
        "mix_linear_channels+scale_filters",
        "mix_linear_channels+bn_fold:decoys=signs",
    ],
)
def test_mix_is_undone_from_the_sketches(
    marked: nn.Module, detector: WatermarkDetector, tiny_task: Task, attacks: str
) -> None:
    before = verify(marked.state_dict(), detector)
    suspect = run(attacks, marked, tiny_task).model
    aligned = detector.aligner.align(kernels_of(suspect, detector)).kernels
    labels = detector.labels
    lost = matching_bits(detector.score_kernels(aligned), labels).sum()
    assert binomial_evidence_bits(int(lost), N) < before.evidence_bits / 2, "without the estimate"
    verdict = verify(suspect.state_dict(), detector)
    assert verdict.accepted and verdict.evidence_bits > 0.6 * before.evidence_bits


def test_mix_is_undone_if_rows_have_factors_of_random_sign(
    marked: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    suspect = flipped(run("mix_linear_channels", marked, tiny_task).model)
    assert function_change(marked, suspect, images(4, SIDE), ()) < TOLERANCE
    assert verify(suspect.state_dict(), detector).evidence_bits > 100


@pytest.mark.parametrize("attacks", ["permute_channels", "bn_fold:decoys=signs", "prune:ratio=0.5"])
def test_networks_without_a_mix_lose_nothing(
    marked: nn.Module, detector: WatermarkDetector, tiny_task: Task, attacks: str
) -> None:
    """An estimate may help where the alignment fails, as with permuted channels of such small networks."""
    assert isinstance(detector.aligner, Aligner)
    own = kernels_of(marked, detector)
    assert detector.aligner.without_mixes(own, detector.aligner.align(own)) is None
    kernels = kernels_of(run(attacks, marked, tiny_task).model, detector)
    alignment = detector.aligner.align(kernels)
    unmixed = detector.aligner.without_mixes(kernels, alignment)
    if unmixed is not None:
        before, after = (
            int(matching_bits(detector.score_kernels(read), detector.labels).sum())
            for read in (alignment.kernels, unmixed)
        )
        assert after > before


def test_estimate_of_a_mix_does_not_count_for_recognition(
    mobile: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    assert isinstance(detector.aligner, Aligner)
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + seed)
            kernels = kernels_of(Mobile(), detector)
        alignment = detector.aligner.align(kernels)
        detector.aligner.without_mixes(kernels, alignment)
        assert detector.aligner.align(kernels).similarity == alignment.similarity
        assert not detector.aligner.descent(kernels, alignment).recognized
    reading = next(detector.read_untrusted(Mobile().state_dict() | kernels))
    assert reading.similarity == alignment.similarity and not reading.recognized


def test_unmixed_reading_is_a_coin_for_other_keys(
    marked: nn.Module, detector: WatermarkDetector, tiny_task: Task
) -> None:
    assert isinstance(detector.aligner, Aligner)
    kernels = kernels_of(run("mix_linear_channels", marked, tiny_task).model, detector)
    unmixed = detector.aligner.without_mixes(kernels, detector.aligner.align(kernels))
    assert unmixed is not None
    for index in range(8):
        other = detector.with_control_key(index)
        matches = int(matching_bits(other.score_kernels(unmixed), other.labels).sum())
        assert abs(matches - N / 2) < 4 * (N / 4) ** 0.5


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30])
def test_hostile_kernels_give_no_estimate_and_no_error(
    marked: nn.Module, detector: WatermarkDetector, value: float
) -> None:
    assert isinstance(detector.aligner, Aligner)
    kernels = kernels_of(marked, detector)
    for name in NARROW:
        kernels[name] = torch.full_like(kernels[name], value)
    unmixed = detector.aligner.without_mixes(kernels, detector.aligner.align(kernels))
    assert unmixed is None or all(bool(kernel.isfinite().all()) for kernel in unmixed.values())
