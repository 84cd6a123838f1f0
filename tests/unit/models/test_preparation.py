from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mtlsign.errors import ModelError
from mtlsign.models.preparation import materialise_weights, prepare_module, prepared, unwrapped


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 36, 2))


def test_unwrapped_returns_network_inside_wrappers() -> None:
    model = network()
    assert unwrapped(nn.DataParallel(torch.compile(model, backend="eager"))) is model
    assert (
        unwrapped(torch.optim.swa_utils.AveragedModel(model)).state_dict().keys() == model.state_dict().keys()
    )
    assert unwrapped(model) is model


def test_unwrapped_returns_network_inside_distributed_wrapper(tmp_path: Path) -> None:
    model = network()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert unwrapped(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        distributed.destroy_process_group()


def test_unwrapped_replaces_compiled_children() -> None:
    model, names = network(), list(network().state_dict())
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    assert list(unwrapped(model).state_dict()) == names


@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(weight_norm, marks=pytest.mark.filterwarnings("ignore")),
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_materialise_weights_gives_plain_names_and_equal_function(
    parametrize: Callable[[nn.Module], nn.Module],
) -> None:
    model, names = network(), sorted(network().state_dict())
    parametrize(model[0])
    with torch.no_grad():
        model.train()(torch.rand(4, 1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    before = model.eval()(x)
    assert materialise_weights(model.train()) == ["0.weight"]
    assert sorted(model.state_dict()) == names and model.training
    torch.testing.assert_close(model.eval()(x), before)
    copy.deepcopy(model).load_state_dict(model.state_dict())


def quantised() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: torch.jit.trace(network().eval(), torch.rand(1, 1, 8, 8)), "TorchScript"),
        (lambda: network().to("meta"), "on the meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "has no shape yet"),
        (quantised, "torch.int8. Mark the network before it is quantised"),
    ],
)
def test_prepare_module_of_unusable_module_names_the_fix(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        prepare_module(build())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_prepared_trains_in_float32_and_restores_types(dtype: torch.dtype) -> None:
    model = network().to(dtype).requires_grad_(False)
    with prepared(model) as preparation:
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in model.parameters())
        saved = preparation.in_original_types(model.state_dict())
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert saved["0.weight"].dtype == dtype and saved["1.num_batches_tracked"].dtype == torch.int64


def test_prepared_replaces_inference_tensors() -> None:
    with torch.inference_mode():
        model = network()
    with prepared(model):
        model(torch.rand(2, 1, 8, 8)).sum().backward()
        model[0].weight.data.add_(1)
    assert not any(tensor.is_inference() for tensor in model.parameters())
