"""Packed kernels of compressed-tensors, quanto and torchao against written formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights
from tests.unit.models.derived_weights.files import codes, numbers, packed_file


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_dequantised(bits: int, zero_points: bool) -> None:
    file, kernel = packed_file(bits, zero_points=zero_points)
    (view,) = DerivedWeights(file).alternatives()
    assert list(view) == ["l.weight"]
    torch.testing.assert_close(view["l.weight"], kernel)


def test_packed_words_with_a_group_index_use_the_group_of_each_column() -> None:
    file, kernel = packed_file(4)
    values = kernel / file["l.weight_scale"].repeat_interleave(8, 1)
    index = codes(0, 2, 24)
    view = DerivedWeights({**file, "l.weight_g_idx": index.int()})
    torch.testing.assert_close(view["l.weight"], values * file["l.weight_scale"][:, index])
    uninitialised = DerivedWeights({**file, "l.weight_g_idx": torch.full((24,), -1)})
    torch.testing.assert_close(uninitialised["l.weight"], kernel)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_shape": torch.tensor([5, 10**9])},
        {"weight_shape": torch.tensor([-5, -24])},
        {"weight_shape": torch.tensor([2**62, 2**62])},
        {"weight_shape": torch.tensor([0, 24])},
        {"weight_shape": torch.tensor([120])},
        {"weight_shape": torch.tensor([5.0, 24.0])},
        {"weight_shape": torch.ones(10**6, dtype=torch.int64)},
        {"weight_scale": numbers(4, 3)},
        {"weight_scale": numbers(5, 7)},
        {"weight_scale": torch.full((5, 3), float("nan"))},
        {"weight_zero_point": torch.zeros(5, 3, dtype=torch.int32)},
        {"weight_zero_point": torch.zeros(3, dtype=torch.int32)},
        {"weight_g_idx": torch.full((24,), 3)},
        {"weight_g_idx": torch.full((24,), -2)},
        {"weight_g_idx": torch.zeros(23, dtype=torch.int64)},
        {"weight_g_idx": torch.zeros(24, dtype=torch.int64), "weight_scale": numbers(100_000, 3)},
        {"weight_packed": torch.zeros(5, 3)},
        {"weight_packed": torch.zeros(5, dtype=torch.int32)},
    ],
    ids=lambda changes: ", ".join(f"{name} {tuple(t.shape)}" for name, t in changes.items()),
)
def test_packed_words_with_misfits_raise_model_error(changes: dict[str, Tensor]) -> None:
    file, _ = packed_file(4)
    view = DerivedWeights({**file, **{f"l.{name}": tensor for name, tensor in changes.items()}})
    with pytest.raises(ModelError):
        view["l.weight"]


@pytest.mark.parametrize("integer_shift", [False, True])
@pytest.mark.parametrize(("bits", "rows"), [(4, 5), (4, 6), (2, 7), (2, 8)])
def test_quanto_packed_rows_are_dequantised(bits: int, rows: int, integer_shift: bool) -> None:
    q, scale = codes(0, 2**bits - 1, rows, 6), numbers(rows, 1).abs()
    parts = 8 // bits
    stored = -(-rows // parts)
    data = torch.zeros(stored, 6, dtype=torch.int64)
    for o in range(rows):
        data[o % stored] += q[o] << (bits * (o // stored))
    shift = codes(0, 3, rows, 1).to(torch.int8) if integer_shift else numbers(rows, 1, seed=2)
    view = DerivedWeights(
        {"l.weight._data._data": data.to(torch.uint8), "l.weight._scale": scale, "l.weight._shift": shift}
    )
    assert list(view) == ["l.weight"]
    kernel = (q - shift) * scale if integer_shift else q * scale - shift
    torch.testing.assert_close(view["l.weight"], kernel)


def test_quanto_bytes_are_dequantised() -> None:
    q, scale = codes(-127, 127, 4, 3, 3, 3).to(torch.int8), numbers(4, 1, 1, 1)
    view = DerivedWeights({"l.weight._data": q, "l.weight._scale": scale, "l.input_scale": numbers()})
    assert list(view) == ["l.input_scale", "l.weight"]
    torch.testing.assert_close(view["l.weight"], q * scale)


@pytest.mark.parametrize("shape", [(3, 6), (0, 6), (6,)])
def test_quanto_packed_with_misfits_raises_model_error(shape: tuple[int, ...]) -> None:
    file = {
        "l.weight._data._data": torch.zeros(shape, dtype=torch.uint8),
        "l.weight._scale": numbers(17, 1),
        "l.weight._shift": numbers(17, 1),
    }
    with pytest.raises(ModelError):
        DerivedWeights(file)["l.weight"]


def test_torchao_int8_with_input_scales_is_dequantised() -> None:
    q, scale, zeros = codes(-128, 127, 4, 6).to(torch.int8), numbers(4, 2), codes(-3, 3, 4, 2).to(torch.int8)
    channels = numbers(6).abs()
    file = {
        "l._weight_qdata": q,
        "l._weight_scale": scale,
        "l._weight_zero_point": zeros,
        "l._weight_act_pre_scale": channels,
        "l._weight_act_quant_scale": numbers(1),
    }
    view = DerivedWeights(file)
    assert list(view) == ["l.weight"]
    kernel = (q - zeros.repeat_interleave(3, 1)) * scale.repeat_interleave(3, 1) * channels
    torch.testing.assert_close(view["l.weight"], kernel)
    with pytest.raises(ModelError):
        DerivedWeights({**file, "l._weight_act_pre_scale": numbers(5)})["l.weight"]


def test_torchao_int4_adds_transposed_zeros() -> None:
    q, scale, zeros = codes(-8, 7, 4, 6), numbers(3, 4).abs(), numbers(3, 4, seed=1)
    data = (q[:, ::2] & 15) | ((q[:, 1::2] & 15) << 4)
    file = {
        "l._weight_qdata": data.to(torch.uint8).view(torch.int8),
        "l._weight_scale": scale,
        "l._weight_zero_point": zeros,
    }
    kernel = torch.tensor(
        [[q[o, i] * scale[i // 2, o] + zeros[i // 2, o] for i in range(6)] for o in range(4)]
    )
    torch.testing.assert_close(DerivedWeights(file)["l.weight"], kernel)
    with pytest.raises(ModelError):
        DerivedWeights({**file, "l._weight_zero_point": numbers(3, 5)})["l.weight"]
