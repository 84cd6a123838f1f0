"""Tests of the response model: invariant to function-preserving scalings, tolerant of missing layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.verification import response_model
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.response_model import ResponseModel
from tests.unit.watermark.verification.spread_examples import (
    KERNELS,
    NORMS,
    TAPS,
    example_model,
    example_reference,
    images,
    network,
)

Tensors = dict[str, Tensor]
X = images(6, seed=5)


def state_of(seed: int = 4) -> Tensors:
    return {name: tensor.clone() for name, tensor in network(seed).state_dict().items()}


def responses(state: Tensors, model: ResponseModel | None = None) -> Tensor:
    model = model or example_model()
    return model.responses(model.select_weights(state))


def layer_parts(values: Tensor, model: ResponseModel) -> dict[str, Tensor]:
    """Return the coordinates of each layer as [O, k]."""
    sizes = [model.weight_shapes[layer.weight][0] * layer.basis.shape[2] for layer in model.layers]
    return {
        layer.weight: part.reshape(-1, layer.basis.shape[2])
        for layer, part in zip(model.layers, values.split(sizes), strict=True)
    }


def positive(count: int, seed: int) -> Tensor:
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def scale_rows(state: Tensors) -> None:
    """Scale rows by positive numbers, which the batch norms and the scale-free first linear layer undo."""
    for seed, (conv, norm) in enumerate(NORMS.items()):
        scale = positive(len(state[f"{conv}.weight"]), seed)
        state[f"{conv}.weight"] *= scale[:, None, None, None]
        if f"{conv}.bias" in state:
            state[f"{conv}.bias"] *= scale
        state[f"{norm}.running_mean"] *= scale
        state[f"{norm}.running_var"] = (state[f"{norm}.running_var"] + 1e-5) * scale**2 - 1e-5


def flip_signs(state: Tensors) -> None:
    """Flip rows together with the sign of γ."""
    for conv, norm in NORMS.items():
        flip = torch.where(torch.arange(len(state[f"{conv}.weight"])) % 2 == 0, -1.0, 1.0)
        state[f"{conv}.weight"] *= flip[:, None, None, None]
        if f"{conv}.bias" in state:
            state[f"{conv}.bias"] *= flip
        state[f"{norm}.running_mean"] *= flip
        state[f"{norm}.weight"] *= flip


def scale_inner_channels(state: Tensors) -> None:
    """Scale channels after a batch norm, and the next layer's columns by the inverse."""
    scale = positive(8, 11)
    state["1.weight"] *= scale
    state["1.bias"] *= scale
    state["3.weight"][:4] /= scale[None, :4, None, None]
    state["3.weight"][4:] /= scale[None, 4:, None, None]
    scale = positive(8, 12)
    state["4.weight"] *= scale
    state["4.bias"] *= scale
    state["6.weight"] /= scale[:, None, None, None]
    scale = positive(8, 13)
    state["7.weight"] *= scale
    state["7.bias"] *= scale
    state["9.weight"] /= scale[None, :, None, None]
    scale = positive(48, 14)
    state["13.weight"] *= scale[:, None]
    state["13.bias"] *= scale
    state["15.weight"] /= scale[None]


def fold_batch_norms(state: Tensors) -> None:
    """Fold γ into the kernels and remove the batch norms; only the kernels matter here."""
    for conv, norm in NORMS.items():
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        state[f"{conv}.weight"] *= factor[:, None, None, None]
        for name in [name for name in state if name.startswith(f"{norm}.")]:
            del state[name]


@pytest.mark.parametrize("change", [scale_rows, flip_signs, scale_inner_channels])
def test_responses_are_invariant_to_scalings_that_preserve_function(
    change: Callable[[Tensors], None],
) -> None:
    state, model = state_of(), network(4)
    with torch.no_grad():
        before = model(X)
        expected = responses(state)
        change(state)
        model.load_state_dict(state)
        torch.testing.assert_close(model(X), before, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(state[name], state_of()[name], rtol=0.1) for name in KERNELS)
    torch.testing.assert_close(responses(state), expected, rtol=0, atol=1e-4)


def test_responses_are_invariant_to_folded_batch_norms() -> None:
    state = state_of()
    expected = responses(state)
    fold_batch_norms(state)
    torch.testing.assert_close(responses(state), expected, rtol=0, atol=1e-4)


def test_responses_depend_on_kernels_and_signs_only() -> None:
    state = state_of()
    expected = responses(state)
    signs = {f"{norm}.weight" for norm in NORMS.values()}
    nonsense = {
        name: tensor if name in KERNELS else tensor.sign() * 7 if name in signs else tensor * 0 + 9
        for name, tensor in state.items()
    }
    assert torch.equal(responses(nonsense), expected)
    state["4.weight"][2] *= -1
    assert not torch.equal(responses(state), expected)


def test_responses_of_permuted_rows_differ() -> None:
    """The invariance tests can fail."""
    state = state_of()
    expected = responses(state)
    state["9.weight"] = state["9.weight"].roll(1, 0)
    assert float((responses(state) - expected).abs().max()) > 0.1


def test_responses_have_unit_rows_and_stated_size() -> None:
    model = example_model()
    values = responses(state_of(), model)
    assert values.dtype == torch.float64 and tuple(values.shape) == (model.coordinates,)
    assert tuple(layer.weight for layer in model.layers) == KERNELS == tuple(model.weight_shapes)
    assert set(model.optional_shapes) == {f"{norm}.weight" for norm in NORMS.values()}
    for part in layer_parts(values, model).values():
        torch.testing.assert_close(part.square().mean(1), torch.ones(len(part), dtype=torch.float64))


def test_responses_equal_rows_times_basis_of_canonical_kernel() -> None:
    """At W0 the column scaling is the identity, so that rows meet the basis directly."""
    model, state = example_model(), state_of(0)
    parts = layer_parts(responses(state, model), model)
    for layer in model.layers:
        rows = model.select_weights(state)[layer.weight].double()
        blocks = rows.reshape(layer.groups, len(rows) // layer.groups, -1)
        expected = (blocks @ layer.basis.double()).flatten(0, 1)
        expected = expected / expected.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(parts[layer.weight], expected, rtol=0, atol=1e-5)


def test_responses_of_zero_rows_remain_zero() -> None:
    model, state = example_model(), state_of()
    state["3.weight"][1] = 0
    state["6.weight"][:] = 0
    state["9.weight"][:, 2] = 0
    state["15.weight"][3] = 0
    values = responses(state, model)
    parts = layer_parts(values, model)
    assert bool(torch.isfinite(values).all())
    assert not parts["3.weight"][1].any() and not parts["6.weight"].any() and not parts["15.weight"][3].any()
    norms = parts["3.weight"].square().mean(1)
    assert torch.allclose(norms[[0, *range(2, 8)]], torch.ones(7, dtype=torch.float64))
    assert parts["9.weight"].any(1).all()


@pytest.mark.parametrize("name", KERNELS)
def test_responses_of_missing_layer_are_zero_and_others_unchanged(name: str) -> None:
    model, state = example_model(), state_of()
    expected = layer_parts(responses(state, model), model)
    del state[name]
    parts = layer_parts(responses(state, model), model)
    assert not parts[name].any() and expected[name].any()
    assert all(torch.equal(parts[other], expected[other]) for other in KERNELS if other != name)


def test_responses_of_half_precision_suspect_are_close() -> None:
    state = state_of()
    halved = {name: t.half().float() if t.is_floating_point() else t for name, t in state.items()}
    torch.testing.assert_close(responses(halved), responses(state), rtol=0, atol=2e-2)


def test_training_path_agrees_with_verification_path_near_w0() -> None:
    model, state = example_model(), state_of(0)
    generator = torch.Generator().manual_seed(2)
    for name in KERNELS:
        kernel = state[name]
        state[name] = kernel + 0.01 * kernel.std() * torch.randn(kernel.shape, generator=generator)
    kernels = {name: k.requires_grad_(True) for name, k in model.select_weights(state).items()}
    trained = model.responses(kernels, differentiable_rounds=2)
    verified = model.responses(kernels)
    assert trained.dtype == torch.float32 and verified.dtype == torch.float64
    torch.testing.assert_close(trained.double(), verified, rtol=0, atol=1e-3)
    weights = torch.randn(len(trained), generator=generator)
    gradients = torch.autograd.grad((trained * weights).sum(), list(kernels.values()))
    for kernel, gradient in zip(kernels.values(), gradients, strict=True):
        assert bool(torch.isfinite(gradient).all()) and bool(gradient.any())
        # Responses do not change with a common factor.
        assert abs(float((kernel.detach() * gradient).sum())) < 1e-3 * float(
            kernel.detach().norm() * gradient.norm()
        )


def test_training_path_of_zero_rows_has_finite_gradient() -> None:
    model, state = example_model(), state_of(0)
    state["3.weight"][1] = 0
    kernels = {name: k.requires_grad_(True) for name, k in model.select_weights(state).items()}
    values = model.responses(kernels, differentiable_rounds=2)
    gradients = torch.autograd.grad(values.square().sum() + values.sum(), list(kernels.values()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_template_values_do_not_matter() -> None:
    state, reference = state_of(), example_reference()
    other = ResponseModel(network(2).train(), TAPS, reference, images(2))
    assert torch.equal(responses(state, other), responses(state))


def changed_reference(**changes: Tensor | None) -> Reference:
    tensors = dict(parse_safetensors(example_reference().raw_bytes))
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return Reference.from_bytes(serialize_safetensors(tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"3/basis": torch.ones(2, 36, 257).half()},
        {"3/basis": torch.ones(2, 36, 0).half()},
        {"3/basis": torch.ones(1, 36, 4).half()},
        {"3/basis": torch.ones(2, 35, 4).half()},
        {"3/basis": torch.ones(36, 4).half()},
        {"3/columns": None},
        {"3/columns": torch.ones(1, 4).double()},
        {"3/columns": torch.ones(2, 4, dtype=torch.int64)},
        {"99/basis": torch.ones(1, 4, 2).half()},
        {"1/basis": torch.ones(1, 4, 2).half()},
        {f"{name.removesuffix('.weight')}/basis": None for name in KERNELS},
    ],
    ids=str,
)
def test_response_model_of_unfitting_reference_raises(changes: dict[str, Tensor | None]) -> None:
    with pytest.raises(ArtifactError, match="reference: "):
        example_model(changed_reference(**changes))


def test_response_model_with_bases_after_the_taps_raises() -> None:
    with pytest.raises(ArtifactError, match="reference: "):
        ResponseModel(network(), ("9",), example_reference(), images(2))
    with pytest.raises(ModelError, match="taps"):
        ResponseModel(network(), ("99",), example_reference(), images(2))


def test_response_model_with_too_many_coordinates_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates = example_model().coordinates
    monkeypatch.setattr(response_model, "MAX_COORDINATES", coordinates - 1)
    with pytest.raises(ArtifactError, match=f"{coordinates:,} coordinates"):
        example_model()


def test_response_model_reads_only_layers_with_basis() -> None:
    model = network()
    bases = response_bases(model, TAPS, images(), layers=["9", "13"])
    chosen = ResponseModel(network(9), TAPS, make_reference(model, TAPS, images(2), bases=bases), images(2))
    assert tuple(chosen.weight_shapes) == ("9.weight", "13.weight")
    everything = example_model()
    parts = layer_parts(responses(state_of(), everything), everything)
    expected = torch.cat([parts["9.weight"].flatten(), parts["13.weight"].flatten()])
    assert torch.equal(responses(state_of(), chosen), expected)
