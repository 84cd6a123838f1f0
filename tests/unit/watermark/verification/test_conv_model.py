"""Tests of the verifier model: it reads kernels and the sign of γ, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.features import Features
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.scores import MIN_SCORE

Maker = Callable[..., nn.Module]


IMAGES = torch.randn(16, 1, 24, 24, generator=torch.Generator().manual_seed(5)).sign()


def verifier_model_of(
    base_weights: nn.Module, template_model: nn.Module, taps: tuple[str, ...] = ("layer1",)
) -> ConvVerifierModel:
    return ConvVerifierModel(template_model, taps, make_reference(base_weights, taps, IMAGES[:2]), IMAGES[:2])


@torch.no_grad()
def features(verifier_model: ConvVerifierModel, tensors: dict[str, Tensor]) -> Tensor:
    return verifier_model.features(
        verifier_model.canonicalize(verifier_model.select_weights(tensors)), IMAGES
    ).standardised


def test_features_do_not_depend_on_template_values(tiny_model: Maker) -> None:
    base_weights, state = tiny_model(0), tiny_model(3).state_dict()
    one, two = (
        verifier_model_of(base_weights, tiny_model(1)),
        verifier_model_of(base_weights, tiny_model(2).train()),
    )
    assert torch.equal(features(one, state), features(two, state))
    assert set(one.weight_shapes) == {
        "conv1.weight",
        *(f"layer1.{b}.conv{c}.weight" for b in (0, 1) for c in (1, 2)),
    }


def test_features_depend_on_kernels_and_bn_signs_only(tiny_model: Maker) -> None:
    verifier_model, state = verifier_model_of(tiny_model(0), tiny_model(1)), tiny_model(3).state_dict()
    expected = features(verifier_model, state)
    nonsense = {
        name: t
        if "conv" in name
        else t.sign() * 7 + (t == 0)
        if name.endswith("weight")
        else torch.full_like(t, 9)
        for name, t in state.items()
    }
    torch.testing.assert_close(features(verifier_model, nonsense), expected)
    torch.testing.assert_close(
        features(
            verifier_model,
            {n: state[n] for n in (*verifier_model.weight_shapes, *verifier_model.optional_shapes)},
        ),
        expected,
    )
    flipped = dict(state) | {"bn1.weight": -state["bn1.weight"]}
    assert (features(verifier_model, flipped) - expected).abs().max() > 0.1


def test_tap_outputs_of_w0_equal_w0_with_batch_statistics(tiny_model: Maker) -> None:
    """BatchNorm in training mode on W0 itself gives the tap outputs of the verifier model for W0."""
    base_weights = tiny_model(0)
    verifier_model, state = verifier_model_of(base_weights, tiny_model(1)), base_weights.state_dict()
    with torch.no_grad():
        output = verifier_model.tap_outputs(
            verifier_model.canonicalize(verifier_model.select_weights(state)), IMAGES
        )[0]
        base_weights.train()
        x = base_weights.layer1(
            base_weights.maxpool(base_weights.relu(base_weights.bn1(base_weights.conv1(IMAGES))))
        )
    # ε is relative to the variance, and unit rows change the variance
    torch.testing.assert_close(output, x, rtol=1e-2, atol=1e-2)


def test_features_leave_template_and_suspect_unchanged(tiny_model: Maker) -> None:
    template_model = tiny_model(1)
    verifier_model = verifier_model_of(tiny_model(0), template_model)
    before = {name: t.clone() for name, t in template_model.state_dict().items()}
    suspect = tiny_model(3).state_dict()
    suspect_before = {name: t.clone() for name, t in suspect.items()}
    first = features(verifier_model, suspect)
    assert torch.equal(features(verifier_model, suspect), first)
    assert all(torch.equal(before[name], t) for name, t in template_model.state_dict().items())
    assert all(torch.equal(suspect_before[name], t) for name, t in suspect.items())


def test_features_ignore_conv_biases_and_take_other_vectors_from_reference() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4)
        )

    torch.manual_seed(0)
    base_weights, suspect = net(), net()
    verifier_model = verifier_model_of(base_weights, net(), ("3",))
    state = dict(suspect.state_dict())
    expected = features(verifier_model, state)
    for name in ("0.bias", "2.bias", "3.weight", "3.bias"):
        state[name] = torch.full_like(state[name], 5.0)
    assert torch.equal(features(verifier_model, state), expected)
    assert verifier_model.other_weights == ["2.weight"] and set(verifier_model.weight_shapes) == {
        "0.weight",
        "2.weight",
    }
    state["2.weight"] = state["2.weight"] + 1
    assert not torch.equal(features(verifier_model, state), expected)


def test_features_gradient_reaches_every_tapped_kernel(tiny_model: Maker) -> None:
    verifier_model, suspect = verifier_model_of(tiny_model(0), tiny_model(1)), tiny_model(2)
    parameters = dict(suspect.named_parameters())
    canonical = verifier_model.canonicalize(
        verifier_model.select_weights(parameters), differentiable_rounds=2
    )
    verifier_model.features(canonical, IMAGES).standardised.square()[:, ::3].mul(
        torch.rand(16, 96)
    ).sum().backward()
    reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    assert reached == set(verifier_model.weight_shapes)


def test_features_pooled_are_channel_means(tiny_model: Maker) -> None:
    taps = ("layer1", "layer2")
    verifier_model, state = verifier_model_of(tiny_model(0), tiny_model(1), taps), tiny_model(2).state_dict()
    with torch.no_grad():
        canonical = verifier_model.canonicalize(verifier_model.select_weights(state))
        one, two = verifier_model.tap_outputs(canonical, IMAGES)
        pooled = verifier_model.features(canonical, IMAGES, pooled=True).standardised
        flat = verifier_model.features(canonical, IMAGES).standardised
    assert pooled.shape == (16, 24) and flat.shape == (16, one[0].numel() + two[0].numel())
    expected = Features.from_taps(torch.cat([one.mean((2, 3)), two.mean((2, 3))], 1)).standardised
    torch.testing.assert_close(pooled, expected)


def test_conv_verifier_model_with_unfitting_reference_raises(tiny_model: Maker) -> None:
    reference = make_reference(tiny_model(0), ["layer1"], IMAGES[:2])
    for name, value in {
        "conv1/gamma": torch.ones(9), "conv1/columns": torch.ones(1, 1), "layer1.0.conv1/eps": None,
    }.items():  # fmt: skip
        tensors = {n: t for n, t in reference.tensors.items() if n != name}
        tensors |= {} if value is None else {name: value}
        data = serialize_safetensors(tensors)
        if name == "conv1/columns":
            ConvVerifierModel(
                tiny_model(1), ["layer1"], Reference(data, tensors), IMAGES[:2]
            )  # the shape [1, 1] fits here
            tensors[name] = torch.ones(2, 1)
        with pytest.raises(ArtifactError, match=name):
            ConvVerifierModel(tiny_model(1), ["layer1"], Reference(data, tensors), IMAGES[:2])
    with pytest.raises(ModelError, match="layer9"):
        ConvVerifierModel(tiny_model(1), ["layer9"], reference, IMAGES[:2])
    whole = parse_safetensors(reference.raw_bytes) | {"conv1/beta": torch.ones(8, dtype=torch.int64)}
    with pytest.raises(ArtifactError, match="conv1/beta"):
        ConvVerifierModel(tiny_model(1), ["layer1"], Reference(b"", whole), IMAGES[:2])


class InputNormalisation(nn.Module):
    """Normalisation whose values are buffers, as in many preprocessing modules."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), mean))
        self.register_buffer("std", torch.full((1, 1, 1, 1), std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[no-any-return, operator]


def network_with_buffers(seed: int) -> nn.Sequential:
    """Return a network whose values, buffers included, depend on the seed."""
    torch.manual_seed(seed)
    tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    network = nn.Sequential(
        InputNormalisation(0.1 * seed, 1.0 + seed), nn.Conv2d(1, 4, 3), tracked, nn.ReLU(),
        nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and buffer.numel() == 4:
            buffer.copy_(torch.rand(4) + 0.5 - (2 * torch.arange(4) % 3 if "5.weight" in name else 0))
    return network.eval()


def test_features_of_network_with_buffers_do_not_depend_on_template() -> None:
    """The mean of the inputs, a tracked instance norm and a frozen batch norm are read from the reference."""
    base, state = network_with_buffers(1), network_with_buffers(1).state_dict()
    reference = make_reference(base, ("6",), IMAGES[:2])
    assert {"=0.mean", "=0.std", "=2.running_mean", "=2.running_var", "4/gamma"} <= set(reference.tensors)
    one, two = (ConvVerifierModel(network_with_buffers(s), ("6",), reference, IMAGES[:2]) for s in (1, 2))
    assert torch.equal(features(one, state), features(two, state))
    assert set(one.optional_shapes) == {"5.weight"}, "the sign of a frozen γ is read as well"
    flipped = state | {"5.weight": -state["5.weight"]}
    assert (features(two, flipped) - features(two, state)).abs().max() > 0.1


def test_verifier_model_of_network_with_buffers_needs_them_in_reference() -> None:
    reference = make_reference(network_with_buffers(1), ("6",), IMAGES[:2])
    tensors = {name: t for name, t in reference.tensors.items() if name != "=0.mean"}
    without = Reference.from_bytes(serialize_safetensors(tensors))
    with pytest.raises(ArtifactError, match=r"=0\.mean"):
        ConvVerifierModel(network_with_buffers(2), ("6",), without, IMAGES[:2])


def scores_of(verifier_model: ConvVerifierModel, tensors: dict[str, Tensor]) -> Tensor:
    """Return 64 scores as a keyed head computes them."""
    kernels = verifier_model.canonicalize(verifier_model.select_weights(tensors))
    values = verifier_model.features(
        {name: kernel.double() for name, kernel in kernels.items()}, IMAGES
    ).standardised
    signs = torch.randn(values.shape[1], 4, generator=torch.Generator().manual_seed(0)).sign().double()
    return (values @ signs / values.shape[1] ** 0.5).flatten()


@pytest.mark.parametrize("gamma, beta", [(1.0, 0.1), (1e-3, 2.0**10), (2.0**-20, 2.0**10)])
@torch.no_grad()
def test_scores_agree_between_threads_and_libraries_for_every_reference(
    gamma: float, beta: float, tiny_model: Maker
) -> None:
    """Rounding decides no score, even for the largest ratio of β to γ that a reference may hold."""
    base, state = tiny_model(0), tiny_model(3).state_dict()
    for name, parameter in base.named_parameters():
        if "bn" in name:
            parameter.fill_(gamma if name.endswith("weight") else beta)
    assert largest_difference_of_scores(verifier_model_of(base, tiny_model(1)), state) < MIN_SCORE / 10


@pytest.mark.parametrize("bias", [0.1, 2.0**24])
@torch.no_grad()
def test_scores_of_network_without_norms_agree_for_every_reference(bias: float) -> None:
    """The deviation below which a coordinate is constant is absolute, and values may reach 2^24 times it."""
    base, template, suspect = (network_without_norms(seed) for seed in (0, 1, 3))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(bias)
    reference = make_reference(base, ("5",), IMAGES[:2])
    verifier_model = ConvVerifierModel(template, ("5",), reference, IMAGES[:2])
    assert largest_difference_of_scores(verifier_model, suspect.state_dict()) < MIN_SCORE / 10


def network_without_norms(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    )


def largest_difference_of_scores(verifier_model: ConvVerifierModel, state: dict[str, Tensor]) -> float:
    """Return the largest difference of scores between threads, libraries and memory formats."""
    expected = scores_of(verifier_model, state)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        differences = [scores_of(verifier_model, state) - expected]
    finally:
        torch.set_num_threads(threads)
    with torch.backends.mkldnn.flags(enabled=False):
        differences.append(scores_of(verifier_model, state) - expected)
    contiguous = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    differences.append(scores_of(verifier_model, contiguous) - expected)
    return max(float(d.abs().max()) for d in differences)
