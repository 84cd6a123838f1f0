"""NF4 and FP4 kernels against written formulas, and hostile states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights
from tests.unit.models.derived_weights.files import nf4_file, numbers, state

STATE = "l.weight.quant_state.bitsandbytes__nf4"
FIELDS = {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [3, 25]}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_dequantised(kind: str, nested: bool) -> None:
    file, kernel = nf4_file(kind=kind, nested=nested)
    derived = DerivedWeights(file).alternatives()[1]
    assert list(derived) == ["l.weight"]
    torch.testing.assert_close(derived["l.weight"], kernel)


def test_four_bits_in_words_of_another_type_are_dequantised() -> None:
    file, kernel = nf4_file()
    data = torch.cat([file["l.weight"].flatten(), torch.zeros(2, dtype=torch.uint8)])
    derived = DerivedWeights({**file, "l.weight": data.view(torch.float32)}).alternatives()[1]
    torch.testing.assert_close(derived["l.weight"], kernel)


def content(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "stored",
    [
        content(b"["),
        content(b"[" * 4000),
        content(b"[" * 200_000),
        content(b'{"shape":' * 400),
        content(b"\xff\xfe{}"),
        content(b"[]"),
        content(b"{}"),
        content(b'{"blocksize": NaN, "shape": [3, 25]}'),
        content(b'{"blocksize": 32, "shape": [3, ' + b"9" * 3000 + b"]}"),
        numbers(20),
        state(**{**FIELDS, "shape": [3, 10**12]}),
        state(**{**FIELDS, "shape": [-3, -25]}),
        state(**{**FIELDS, "shape": "secret"}),
        state(**{**FIELDS, "shape": [3.0, 25.0]}),
        state(**{**FIELDS, "shape": [True] * 75}),
        state(**{**FIELDS, "shape": None}),
        state(**{**FIELDS, "shape": [3, 28]}),
        state(**{**FIELDS, "blocksize": 0}),
        state(**{**FIELDS, "blocksize": -32}),
        state(**{**FIELDS, "blocksize": 64}),
        state(**{**FIELDS, "blocksize": [32]}),
        state(**{**FIELDS, "blocksize": 1e300}),
    ],
)
def test_four_bits_with_a_hostile_state_raise_model_error(stored: Tensor) -> None:
    file, _ = nf4_file()
    with pytest.raises(ModelError) as caught:
        DerivedWeights({**file, STATE: stored}).alternatives()[1]["l.weight"]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("absmax", numbers(4)),
        ("absmax", torch.full((3,), float("nan"))),
        ("absmax", torch.zeros(3, dtype=torch.complex64)),
    ],
)
def test_four_bits_with_misfits_raise_model_error(name: str, value: Tensor) -> None:
    file, _ = nf4_file()
    with pytest.raises(ModelError):
        DerivedWeights({**file, f"l.weight.{name}": value}).alternatives()[1]["l.weight"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("absmax", numbers(3)),
        ("nested_absmax", numbers(2)),
        ("nested_quant_map", numbers(255)),
        ("quant_state.bitsandbytes__nf4", state(**FIELDS, nested_blocksize=256, nested_offset="1")),
        ("quant_state.bitsandbytes__nf4", state(**FIELDS, nested_blocksize=256, nested_offset=10**400)),
        ("quant_state.bitsandbytes__nf4", state(**FIELDS, nested_blocksize=2.0, nested_offset=0)),
    ],
)
def test_nested_scales_with_misfits_raise_model_error(name: str, value: Tensor) -> None:
    file, _ = nf4_file(nested=True)
    with pytest.raises(ModelError):
        DerivedWeights({**file, f"l.weight.{name}": value}).alternatives()[1]["l.weight"]
