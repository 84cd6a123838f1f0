"""Tests of response bases: they span the directions in which a layer's natural inputs vary."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.watermark.verification import input_moments as module
from mtlsign.watermark.verification.input_moments import input_moments, input_patches
from mtlsign.watermark.verification.response_bases import (
    ENERGY,
    MAX_DIRECTIONS,
    placeholder_bases,
    response_bases,
)
from tests.unit.watermark.verification.spread_examples import KERNELS, TAPS, images, network

#: Layers on inputs [n, 4, 8, 8].
LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, (3, 5), stride=2, padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 6)),
    "linear on tokens": lambda: nn.Linear(8, 6),
}  # fmt: skip
INPUTS = images(300, side=8, channels=4)


@pytest.fixture
def all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use every position of a feature map, so that covariances are those of the whole output."""
    monkeypatch.setattr(module, "_MAX_POSITIONS", 64)


def built(kind: str) -> tuple[nn.Module, str, nn.Module]:
    """Return a network with one layer, the layer's name, and the layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(LAYERS[kind](), nn.Identity())
    ((name, layer),) = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight")]
    return model, name, layer


def rows_of(layer: nn.Module, groups: int) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().double().reshape(groups, -1, layer.weight[0].numel())


@pytest.mark.usefixtures("all_positions")
@pytest.mark.parametrize("kind", LAYERS)
def test_input_moments_give_variance_of_layer_outputs(kind: str) -> None:
    model, name, layer = built(kind)
    covariance = input_moments(model, ["1"], INPUTS, [name])[name].covariance
    rows = rows_of(layer, len(covariance))
    predicted = ((rows @ covariance) * rows).sum(2).flatten()
    with torch.no_grad():
        output = model.double()(INPUTS.double())
    channels = -1 if isinstance(layer, nn.Linear) else 1
    expected = output.movedim(channels, 0).flatten(1).var(1, unbiased=False)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", LAYERS)
def test_response_bases_reproduce_covariance_up_to_one_percent(kind: str) -> None:
    """Inside the span B the covariance is reproduced; outside remains at most 3 % of the variance."""
    model, name, _ = built(kind)
    covariance = input_moments(model, ["1"], INPUTS, [name])[name].covariance
    basis = response_bases(model, ["1"], INPUTS)[name]
    assert basis.dtype == torch.float16 and basis.shape[:2] == covariance.shape[:2]
    columns = basis.double()
    variances = columns.transpose(1, 2) @ covariance @ columns
    total = covariance.diagonal(dim1=1, dim2=2).sum()
    held = variances.diagonal(dim1=1, dim2=2)
    assert float(held.sum() / total) > ENERGY - 0.01
    # One direction less would hold less.
    assert float(held[:, :-1].sum() / total) < ENERGY + 0.01
    rebuilt = columns @ variances @ columns.transpose(1, 2)
    leading = columns @ columns.transpose(1, 2) @ covariance
    assert float((rebuilt - leading).norm() / covariance.norm()) < 0.01
    # The columns are eigenvectors: variances along them are uncorrelated.
    off_diagonal = variances - torch.diag_embed(held)
    assert float(off_diagonal.norm() / variances.norm()) < 0.01


@pytest.mark.parametrize("kind", LAYERS)
def test_response_bases_have_orthonormal_columns_with_positive_largest_element(kind: str) -> None:
    model, name, _ = built(kind)
    basis = response_bases(model, ["1"], INPUTS)[name].double()
    gram = basis.transpose(1, 2) @ basis
    torch.testing.assert_close(gram, torch.eye(gram.shape[1]).double().expand_as(gram), rtol=0, atol=5e-3)
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())
    covariance = input_moments(model, ["1"], INPUTS, [name])[name].covariance
    variances = (basis.transpose(1, 2) @ covariance @ basis).diagonal(dim1=1, dim2=2)
    first = variances[:, :1]
    assert bool((variances[:, 1:] <= variances[:, :-1] + 5e-3 * first).all()), "leading direction first"


def test_response_bases_in_another_process_have_equal_bytes() -> None:
    """The reference, and with it the key of a run with a fixed nonce, must not depend on the process."""
    code = (
        "import hashlib, torch; from torch import nn\n"
        "from mtlsign.watermark.verification.response_bases import response_bases\n"
        "torch.manual_seed(0); model = nn.Sequential(nn.Linear(1100, 4), nn.Identity())\n"
        "basis = response_bases(model, ['1'], torch.rand(1500, 1100) ** 3)['0']\n"
        "digest = hashlib.sha256(basis.numpy().tobytes()).hexdigest()"
    )
    names: dict[str, str] = {}
    exec(code, names)
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(digest)"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == names["digest"]


def test_response_bases_have_at_most_256_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 4), nn.Identity())
    basis = response_bases(model, ["1"], torch.randn(600, 400))["0"]
    assert tuple(basis.shape) == (1, 400, MAX_DIRECTIONS)


def test_response_bases_use_running_statistics_and_leave_model_unchanged() -> None:
    model, trained = network(), network().train()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    expected = response_bases(model, TAPS, images())
    assert [f"{name}.weight" for name in expected] == list(KERNELS)
    modes = [module.training for module in trained.modules()]
    found = response_bases(trained, TAPS, images())
    assert all(torch.equal(found[name], basis) for name, basis in expected.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert [module.training for module in trained.modules()] == modes
    assert not any(module._forward_pre_hooks for module in trained.modules())
    with torch.no_grad():
        trained[1].running_mean += 1
    shifted = response_bases(trained, TAPS, images())
    assert torch.equal(shifted["0"], expected["0"]) and not torch.equal(shifted["3"], expected["3"])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_response_bases_of_layer_with_constant_inputs_are_finite(value: float) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Identity())
    basis = response_bases(model, ["1"], torch.full((4, 4, 8, 8), value))["0"]
    assert bool(torch.isfinite(basis).all()) and 1 <= basis.shape[2] <= 4


def test_response_bases_of_chosen_layers_equal_those_of_all() -> None:
    everything = response_bases(network(), TAPS, images())
    chosen = response_bases(network(), TAPS, images(), layers=["9", "3"])
    assert list(chosen) == ["3", "9"]
    assert all(torch.equal(chosen[name], everything[name]) for name in chosen)


@pytest.mark.parametrize("layers", [["conv9"], ["3", "1"], ["12"], []])
def test_response_bases_of_unknown_layers_raise(layers: list[str]) -> None:
    with pytest.raises(ModelError, match=r"layers: .*Choose among 0, 3, 6, 9, 13, 15"):
        response_bases(network(), TAPS, images(4), layers=layers)
    with pytest.raises(ModelError, match="taps"):
        response_bases(network(), ["99"], images(4))


def test_response_bases_of_network_without_supported_layers_raise() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Identity())
    with pytest.raises(ModelError, match="layers: "):
        response_bases(model, ["1"], torch.randn(2, 4, 8))


def test_placeholder_bases_are_at_least_as_large_as_measured_ones() -> None:
    measured = response_bases(network(), TAPS, images())
    largest = placeholder_bases(network(), TAPS, images(2))
    assert list(largest) == list(measured)
    for name, basis in measured.items():
        assert largest[name].shape[:2] == basis.shape[:2] and largest[name].dtype == basis.dtype
        assert basis.shape[2] <= largest[name].shape[2] <= MAX_DIRECTIONS
    assert list(placeholder_bases(network(), TAPS, images(2), layers=["6"])) == ["6"]


def test_input_patches_of_large_map_are_16_positions_of_a_grid() -> None:
    conv = nn.Conv2d(1, 2, 1)
    inputs = torch.arange(400.0).reshape(1, 1, 20, 20)
    patches = input_patches(conv, inputs)
    assert tuple(patches.shape) == (1, 16, 1)
    positions = patches.flatten().tolist()
    assert positions == sorted(set(positions)) and (positions[0], positions[-1]) == (0, 399)
    assert {b - a for a, b in itertools.pairwise(positions)} <= {26, 27}


@pytest.mark.usefixtures("all_positions")
def test_input_patches_times_rows_equal_outputs() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    patches = input_patches(conv, INPUTS[:5])
    rows = conv.weight.detach().reshape(2, 3, -1)
    products = patches @ rows.transpose(1, 2)
    expected = F.conv2d(INPUTS[:5], conv.weight.detach(), padding=1, groups=2)
    expected = expected.reshape(5, 2, 3, 64).permute(1, 0, 3, 2).reshape(2, -1, 3)
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-5)
