from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import ATTACKS, NotApplicableError
from mtlsign.attacks.attacker_data import transform_inputs
from mtlsign.attacks.equal_function import TOLERANCE, function_change
from mtlsign.models import architectures
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import Maker, flat_network, run
from tests.unit.attacks.test_registry import NOT_FOR_IMAGES

#: Parameters where the defaults do not apply to images of one channel.
PARAMETERS = {"mix_input": "mix_input:kind=negate", "turn_input": "turn_input:kind=transposed"}
FREE = [
    PARAMETERS.get(name, name)
    for name, attack in ATTACKS.items()
    if attack.kind == "function_preserving" and name not in NOT_FOR_IMAGES
]
SEQUENCE = (
    "scale_residual_channels+permute_channels+scale_inner_channels+scale_filters+bn_reparameterize+bn_fold"
)


@pytest.mark.parametrize("name", FREE)
def test_symmetry_preserves_function(name: str, tiny_model: Maker, tiny_task: Task) -> None:
    """On random batch norms, some gamma negative: outputs change by at most 1e-5 of the largest."""
    model = tiny_model(1)
    done = run(name, model, tiny_task, 1)
    x = torch.rand(16, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    assert function_change(model, done.model, x, done.input_transforms) < TOLERANCE  # in float64
    with torch.no_grad():  # in float32
        expected, actual = model(x), done.model(transform_inputs(x, done.input_transforms))
    assert float((expected - actual).abs().max() / expected.abs().max()) < TOLERANCE
    # a model that needs transformed inputs is another function without them
    assert (function_change(model, done.model, x) > 1e-3) == bool(done.input_transforms)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("text", [SEQUENCE])
def test_symmetries_in_sequence_preserve_function_of_both_kinds_of_block(
    arch: str, text: str, tiny_task: Task
) -> None:
    torch.manual_seed(0)
    model = architectures.build(architectures.architecture_for(arch, channels=1, classes=4, width=8)).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                m.weight.uniform_(0.5, 1.5)
    done = run(text, model, tiny_task)
    names = set(done.model.state_dict())
    assert "conv1.bias" in names and not any("running" in n or ".bn" in n for n in names)
    x = torch.rand(4, 1, 24, 24)
    assert function_change(model, done.model, x) < 2 * TOLERANCE


def test_verifier_ignores_scales_permutations_and_input_transforms(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    def accuracy(text: str) -> float:
        return verify(run(text, marked_module, tiny_task).model.state_dict(), key.detector).accuracy

    baseline = accuracy("none")
    assert baseline > 0.95
    for text in (
        "bn_reparameterize", "bn_fold", "scale_filters", "scale_inner_channels", "scale_residual_channels",
        "scale_inner_channels+bn_fold", "permute_channels:which=inner", "permute_channels:which=residual",
        "transpose_input", "negate_input",
    ):  # fmt: skip
        assert accuracy(text) >= baseline - 0.02, text


def test_symmetry_of_other_architecture_is_not_applicable(tiny_task: Task) -> None:
    plain = flat_network()
    assert (
        function_change(plain, run("permute_channels", plain, tiny_task).model, torch.rand(4, 1, 24, 24))
        < TOLERANCE
    )
    with pytest.raises(NotApplicableError, match="no symmetry"):  # the flattened map is transposed, too
        run("transpose_input", plain, tiny_task)
    assert run("negate_input", plain, tiny_task).input_transforms == ("negated",)
    with pytest.raises(NotApplicableError, match="stages of Sequential"):
        run("decorrelate:steps=1", plain, tiny_task)


class NormAct(nn.BatchNorm2d):
    """A batch norm that contains its activation, as in timm."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def test_symmetries_preserve_function_of_sequential_network(tiny_task: Task) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3), NormAct(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for m in (model[1], model[3]):
            m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            m.weight.uniform_(-1, 1)
    for text in ("bn_fold", "bn_reparameterize", "scale_filters", "transpose_input", "negate_input"):
        done = run(text, model, tiny_task)
        x = torch.rand(4, 1, 24, 24)
        assert function_change(model, done.model, x, done.input_transforms) < TOLERANCE, text
    assert "1.weight" not in run("bn_fold", model, tiny_task).model.state_dict()
    folded = run("bn_fold:decoys=signs", model, tiny_task).model.state_dict()
    assert "3.weight" in folded and "3.running_var" not in folded
    assert (run("prune_channels:ratio=0.4", model, tiny_task).model[1].weight == 0).sum() == 2  # type: ignore[index]
    plain = flat_network()
    for text in ("bn_fold", "bn_reparameterize", "scale_filters"):
        with pytest.raises(NotApplicableError, match="has no batch norm"):
            run(text, plain, tiny_task)
