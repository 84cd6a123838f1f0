"""The verifier's graph reads kernels and the sign of γ, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.verification.graph import MIN_STD, Features, VerifierModel, exact_fp32
from mtlsign.watermark.verification.reference import Reference, make_reference

Maker = Callable[..., nn.Module]
IMAGES = torch.randn(16, 1, 24, 24, generator=torch.Generator().manual_seed(5)).sign()


def graph_of(
    base_weights: nn.Module, skeleton: nn.Module, taps: tuple[str, ...] = ("layer1",)
) -> VerifierModel:
    return VerifierModel(skeleton, taps, make_reference(base_weights, taps, IMAGES[:2]), IMAGES[:2])


@torch.no_grad()
def features(graph: VerifierModel, tensors: dict[str, Tensor]) -> Tensor:
    return graph.features(graph.into_frame(graph.read(tensors)), IMAGES).standardised


def test_the_skeletons_values_do_not_matter(tiny_model: Maker) -> None:
    base_weights, state = tiny_model(0), tiny_model(3).state_dict()
    one, two = graph_of(base_weights, tiny_model(1)), graph_of(base_weights, tiny_model(2).train())
    assert torch.equal(features(one, state), features(two, state))
    assert set(one.kernels) == {
        "conv1.weight",
        *(f"layer1.{b}.conv{c}.weight" for b in (0, 1) for c in (1, 2)),
    }


def test_only_kernels_and_signs_are_read(tiny_model: Maker) -> None:
    graph, state = graph_of(tiny_model(0), tiny_model(1)), tiny_model(3).state_dict()
    expected = features(graph, state)
    nonsense = {
        name: t
        if "conv" in name
        else t.sign() * 7 + (t == 0)
        if name.endswith("weight")
        else torch.full_like(t, 9)
        for name, t in state.items()
    }
    torch.testing.assert_close(features(graph, nonsense), expected)
    torch.testing.assert_close(
        features(graph, {n: state[n] for n in (*graph.kernels, *graph.gammas.values())}), expected
    )
    flipped = dict(state) | {"bn1.weight": -state["bn1.weight"]}
    assert (features(graph, flipped) - expected).abs().max() > 0.1


def test_w0_in_its_own_graph_is_w0_with_batch_statistics(tiny_model: Maker) -> None:
    """Written out by hand: BN in training mode on W0 itself gives the graph's taps for W0."""
    base_weights = tiny_model(0)
    graph, state = graph_of(base_weights, tiny_model(1)), base_weights.state_dict()
    with torch.no_grad():
        got = graph.taps_of(graph.into_frame(graph.read(state)), IMAGES)[0]
        base_weights.train()
        x = base_weights.layer1(
            base_weights.maxpool(base_weights.relu(base_weights.bn1(base_weights.conv1(IMAGES))))
        )
    # ε is relative to the variance, and unit rows change the variance
    torch.testing.assert_close(got, x, rtol=1e-2, atol=1e-2)


def test_running_statistics_are_never_touched(tiny_model: Maker) -> None:
    skeleton = tiny_model(1)
    graph = graph_of(tiny_model(0), skeleton)
    before = {name: t.clone() for name, t in skeleton.state_dict().items()}
    suspect = tiny_model(3).state_dict()
    kept = {name: t.clone() for name, t in suspect.items()}
    first = features(graph, suspect)
    assert torch.equal(features(graph, suspect), first)
    assert all(torch.equal(before[name], t) for name, t in skeleton.state_dict().items())
    assert all(torch.equal(kept[name], t) for name, t in suspect.items())


def test_conv_biases_before_a_batch_norm_are_dropped_and_other_vectors_are_those_of_w0() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4)
        )

    torch.manual_seed(0)
    base_weights, suspect = net(), net()
    graph = graph_of(base_weights, net(), ("3",))
    state = dict(suspect.state_dict())
    expected = features(graph, state)
    for name in ("0.bias", "2.bias", "3.weight", "3.bias"):
        state[name] = torch.full_like(state[name], 5.0)
    assert torch.equal(features(graph, state), expected)
    assert graph.plain_weights == ["2.weight"] and set(graph.kernels) == {"0.weight", "2.weight"}
    state["2.weight"] = state["2.weight"] + 1
    assert not torch.equal(features(graph, state), expected)


def test_gradients_reach_every_tapped_kernel(tiny_model: Maker) -> None:
    graph, suspect = graph_of(tiny_model(0), tiny_model(1)), tiny_model(2)
    parameters = dict(suspect.named_parameters())
    framed = graph.into_frame(graph.read(parameters), differentiable_rounds=2)
    graph.features(framed, IMAGES).standardised.square()[:, ::3].mul(torch.rand(16, 96)).sum().backward()
    reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    assert reached == set(graph.kernels)


def test_standardisation_and_dead_coordinates() -> None:
    flat = torch.tensor(
        [[1.0, 5.0, 0.0], [3.0, 5.0, 1.5 * MIN_STD], [5.0, 5.0, 0.0], [7.0, 5.0, 1.5 * MIN_STD]]
    )
    f = Features.of(flat.requires_grad_(True))
    assert f.inverse_std[1] == 0 and f.inverse_std[2] == 0  # std 0 and 0.75e-5
    torch.testing.assert_close(f.inverse_std[0], torch.tensor(5.0**-0.5))
    torch.testing.assert_close(f.standardised[:, 0], torch.tensor([-3.0, -1, 1, 3]) / 5**0.5)
    assert not f.standardised[:, 1:].any()
    f.standardised.square().mul(torch.rand(4, 3)).sum().backward()
    assert torch.isfinite(flat.grad).all()  # type: ignore[arg-type]
    alive = Features.of(flat.detach() * 3)
    assert alive.inverse_std[2] > 0


def test_pooled_features_are_channel_means(tiny_model: Maker) -> None:
    taps = ("layer1", "layer2")
    graph, state = graph_of(tiny_model(0), tiny_model(1), taps), tiny_model(2).state_dict()
    with torch.no_grad():
        framed = graph.into_frame(graph.read(state))
        one, two = graph.taps_of(framed, IMAGES)
        pooled = graph.features(framed, IMAGES, pooled=True).standardised
        flat = graph.features(framed, IMAGES).standardised
    assert pooled.shape == (16, 24) and flat.shape == (16, one[0].numel() + two[0].numel())
    expected = Features.of(torch.cat([one.mean((2, 3)), two.mean((2, 3))], 1)).standardised
    torch.testing.assert_close(pooled, expected)


def test_a_reference_that_does_not_fit_is_refused(tiny_model: Maker) -> None:
    reference = make_reference(tiny_model(0), ["layer1"], IMAGES[:2])
    for name, value in {
        "conv1/gamma": torch.ones(9), "conv1/columns": torch.ones(1, 1), "layer1.0.conv1/eps": None,
    }.items():  # fmt: skip
        tensors = {n: t for n, t in reference.tensors.items() if n != name}
        tensors |= {} if value is None else {name: value}
        data = serialize_safetensors(tensors)
        if name == "conv1/columns":
            VerifierModel(
                tiny_model(1), ["layer1"], Reference(data, tensors), IMAGES[:2]
            )  # [1, 1] is right here
            tensors[name] = torch.ones(2, 1)
        with pytest.raises(ArtifactError, match=name):
            VerifierModel(tiny_model(1), ["layer1"], Reference(data, tensors), IMAGES[:2])
    with pytest.raises(ModelError, match="layer9"):
        VerifierModel(tiny_model(1), ["layer9"], reference, IMAGES[:2])
    whole = parse_safetensors(reference.data) | {"conv1/beta": torch.ones(8, dtype=torch.int64)}
    with pytest.raises(ArtifactError, match="conv1/beta"):
        VerifierModel(tiny_model(1), ["layer1"], Reference(b"", whole), IMAGES[:2])


def test_exact_fp32_overrules_the_caller_and_gives_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        a = torch.randn(8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with exact_fp32():
                assert (a @ a).dtype == torch.float32
                assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
