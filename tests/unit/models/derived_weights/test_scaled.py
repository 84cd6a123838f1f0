"""Kernels of 8 bits with scales against written formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights
from mtlsign.models.derived_weights.scaled import expanded
from tests.unit.models.derived_weights.files import codes, numbers


def scaled_reference(
    q: Tensor, scale: Tensor, rows: int, columns: int, zeros: Tensor | None = None
) -> Tensor:
    values = torch.empty(q.shape)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            z = 0.0 if zeros is None else float(zeros[o // rows, i // columns])
            values[o, i] = (float(q[o, i]) - z) * float(scale[o // rows, i // columns])
    return values


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("shape", "rows", "columns"), [((1, 1), 6, 8), ((6, 1), 1, 8), ((6, 2), 1, 4)])
def test_int8_with_scales_is_dequantised(
    shape: tuple[int, int], rows: int, columns: int, zero_points: bool
) -> None:
    q, scale = codes(-128, 127, 6, 8).to(torch.int8), numbers(*shape).abs()
    zeros = codes(-9, 9, *shape).to(torch.int8) if zero_points else None
    file = {"l.weight": q, "l.weight_scale": scale, "l.bias": numbers(6)}
    if zeros is not None:
        file["l.weight_zero_point"] = zeros
    stored, derived = DerivedWeights(file).alternatives()
    assert list(derived) == ["l.bias", "l.weight"]
    torch.testing.assert_close(derived["l.weight"], scaled_reference(q, scale, rows, columns, zeros))
    torch.testing.assert_close(stored["l.weight"], q.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_block_scales_is_dequantised(dtype: torch.dtype) -> None:
    q, scale = numbers(130, 260).to(dtype), numbers(2, 3).abs()
    kernel = q.float() * torch.kron(scale, torch.ones(128, 128))[:130, :260]
    derived = DerivedWeights({"l.weight": q, "l.weight_scale_inv": scale}).alternatives()[1]
    torch.testing.assert_close(derived["l.weight"], kernel)


def test_int8_convolution_with_row_scales_is_dequantised() -> None:
    q, scale = codes(-128, 127, 4, 3, 3, 3).to(torch.int8), numbers(4)
    derived = DerivedWeights({"l.weight": q, "l.weight_scale": scale}).alternatives()[1]
    torch.testing.assert_close(derived["l.weight"], torch.stack([q[o].float() * scale[o] for o in range(4)]))


def test_int8_of_bitsandbytes_is_divided_by_127() -> None:
    q, maxima = codes(-127, 127, 3, 4).to(torch.int8), numbers(3).abs()
    file = {"l.weight": q, "l.SCB": maxima, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    derived = DerivedWeights(file).alternatives()[1]
    assert list(derived) == ["l.weight"]
    torch.testing.assert_close(derived["l.weight"], q * maxima[:, None] / 127)
    file["l.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(ModelError):
        DerivedWeights(file).alternatives()[1]["l.weight"]


def test_plain_floats_with_unused_scales_are_unchanged() -> None:
    weight = numbers(3, 4)
    for view in DerivedWeights({"l.weight": weight, "l.weight_scale": numbers(7)}).alternatives():
        assert torch.equal(view["l.weight"], weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_bare_codes_are_read_as_numbers(dtype: torch.dtype) -> None:
    q = codes(-8, 8, 3, 4).float()
    (view,) = DerivedWeights({"l.weight": q.to(dtype)}).alternatives()
    assert view["l.weight"].dtype == torch.float32 and torch.equal(view["l.weight"], q)


@pytest.mark.parametrize(
    "scale",
    [
        numbers(4),
        numbers(3, 5),
        numbers(2, 2, 2),
        numbers(6, 16),
        torch.tensor(float("nan")),
        torch.full((6, 1), float("inf")),
        torch.empty(0),
        torch.ones(6, dtype=torch.complex64),
        torch.ones(6, dtype=torch.bool),
        torch.empty(6, device="meta"),
        torch.ones(1).expand(2**27),
    ],
    ids=lambda scale: f"{tuple(scale.shape)} {scale.dtype}",
)
def test_int8_with_misfits_raises_model_error(scale: Tensor) -> None:
    file = {"secret.weight": codes(-128, 127, 6, 8).to(torch.int8), "secret.weight_scale": scale}
    with pytest.raises(ModelError) as caught:
        DerivedWeights(file).alternatives()[1]["secret.weight"]
    assert caught.value.field == "checkpoint" and "secret" not in str(caught.value)


def test_expanded_scale_allocates_no_more_than_twice_the_kernel() -> None:
    assert expanded(torch.ones(2, 300), (129, 300)).untyped_storage().nbytes() <= 2 * 4 * 129 * 300
    with pytest.raises(ModelError):
        expanded(torch.ones(2, 10**6), (129, 300))
