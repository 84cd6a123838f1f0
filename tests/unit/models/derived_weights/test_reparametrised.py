"""Weight norm, spectral norm and pruning against PyTorch and against written formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights
from tests.unit.models.derived_weights.files import numbers


def reference_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    return torch.stack([g.flatten()[o] * row / row.square().sum().sqrt() for o, row in enumerate(v)])


@pytest.mark.parametrize(
    "names",
    [
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ],
)
def test_weight_norm_with_rows_gives_scaled_unit_rows(names: tuple[str, str]) -> None:
    g, v = numbers(4, 1, 1, 1), numbers(4, 3, 3, 3, seed=1)
    view = DerivedWeights({f"l.{names[0]}": g, f"l.{names[1]}": v})
    assert list(view) == ["l.weight"]
    torch.testing.assert_close(view["l.weight"], reference_weight_norm(g, v))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_of_pytorch_gives_its_weight(dim: int | None) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4), dim=dim))
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(3)
    weight = DerivedWeights(model.state_dict())["0.weight"]
    torch.testing.assert_close(weight, model[0].weight.detach())


def test_weight_norm_without_a_layer_name_gives_weight() -> None:
    view = DerivedWeights({"weight_g": numbers(4, 1), "weight_v": numbers(4, 5)})
    assert list(view) == ["weight"] and view["weight"].shape == (4, 5)


@pytest.mark.parametrize(
    "names",
    [
        ("weight_orig", "weight_u", "weight_v"),
        tuple(f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v")),
    ],
)
def test_spectral_norm_divides_by_sigma(names: tuple[str, ...]) -> None:
    w, u, v = numbers(4, 3, 2, 2), numbers(4, seed=1), numbers(12, seed=2)
    sigma = sum(float(u[o] * w[o].flatten()[i] * v[i]) for o in range(4) for i in range(12))
    view = DerivedWeights(dict(zip((f"l.{n}" for n in names), (w, u, v), strict=True)))
    assert list(view) == ["l.weight"]
    torch.testing.assert_close(view["l.weight"], w / sigma, rtol=1e-4, atol=1e-5)


def test_pruned_layer_of_pytorch_gives_its_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    weight = DerivedWeights(model.state_dict())["0.weight"]
    assert torch.equal(weight, model[0].weight.detach()) and int((weight == 0).sum()) > 40


@pytest.mark.parametrize(
    ("g", "v"),
    [
        (numbers(3, 1), numbers(4, 5)),
        (numbers(4), numbers(4, 5)),
        (numbers(4, 5), numbers(4, 5)),
        (torch.full((4, 1), float("nan")), numbers(4, 5)),
        (numbers(4, 1), torch.zeros(4, 5)),
        (numbers(4), numbers(4)),
        (numbers(4, 1).to(torch.int32), numbers(4, 5)),
        (numbers(4, 1).to_sparse(), numbers(4, 5)),
        (torch.empty(4, 1, device="meta"), numbers(4, 5)),
        (torch.empty(0, 1), torch.empty(0, 5)),
        (torch.ones(1, 1), torch.ones(1, 1).expand(2**14, 2**14)),
    ],
    ids=lambda value: str(tuple(value.shape)),
)
def test_weight_norm_with_misfits_raises_model_error(g: Tensor, v: Tensor) -> None:
    view = DerivedWeights({"secret.weight_g": g, "secret.weight_v": v})
    with pytest.raises(ModelError) as caught:
        view["secret.weight"]
    assert caught.value.field == "checkpoint" and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("w", "u", "v"),
    [
        (numbers(4, 5), torch.zeros(4), numbers(5)),
        (numbers(4, 5), numbers(5), numbers(4)),
        (numbers(4, 5), numbers(4, 1), numbers(5)),
        (numbers(4), numbers(4), numbers(1)),
        (numbers(4, 5), torch.full((4,), 1e-38), torch.full((5,), 1e-38)),
    ],
)
def test_spectral_norm_with_misfits_raises_model_error(w: Tensor, u: Tensor, v: Tensor) -> None:
    with pytest.raises(ModelError):
        DerivedWeights({"l.weight_orig": w, "l.weight_u": u, "l.weight_v": v})["l.weight"]


def test_pruned_layer_with_another_mask_raises_model_error() -> None:
    with pytest.raises(ModelError):
        DerivedWeights({"l.weight_orig": numbers(4, 5), "l.weight_mask": numbers(5)})["l.weight"]
