from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from mtlsign.errors import ModelError
from mtlsign.models.unnamed_tensors import file_tensors
from mtlsign.models.unnamed_tensors.file_tensors import MAX_TENSORS


def test_file_tensors_are_in_the_natural_order_of_names() -> None:
    names = ["b.10.w", "b.9.w", "b.1.w", "a.2", "a", "٣", "b.1.v"]
    tensors = file_tensors({name: torch.ones(1) for name in names})
    assert [tensor.name for tensor in tensors] == ["a", "a.2", "b.1.v", "b.1.w", "b.9.w", "b.10.w", "٣"]
    assert [tensor.place for tensor in tensors] == list(range(7))
    reverse = file_tensors({name: torch.ones(1) for name in reversed(names)})
    assert [tensor.name for tensor in reverse] == [tensor.name for tensor in tensors]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([math.nan, 1]),
        torch.full((2,), 1e300, dtype=torch.float64),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, 2, device="meta"),
        torch.ones(1).expand(10**8),
        torch.ones(1).expand(10**12),
        torch.ones(2, 2).to_sparse(),
        torch.ones(0, 3),
        torch.tensor(1.0),
        "text",
        None,
    ],
    ids=["nan", "overflow", "int", "meta", "expanded", "huge", "sparse", "empty", "scalar", "text", "none"],
)
def test_file_tensors_leaves_out_what_is_no_finite_tensor(value: Any) -> None:
    tensors = file_tensors({"a": torch.ones(2, 2).half(), "b": value})
    assert [tensor.name for tensor in tensors] == ["a"] and tensors[0].values.dtype == torch.float32


def test_file_tensors_has_both_readings_of_two_stored_forms() -> None:
    codes, scale = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), torch.tensor([2.0, 3.0])
    stored, scaled = file_tensors({"x.weight": codes, "x.weight_scale": scale})
    assert stored.place == scaled.place
    assert torch.equal(stored.values, codes.float()) and torch.equal(scaled.values, codes * scale[:, None])


@pytest.mark.parametrize("axes", [(2, 3), (0, 1), (1, 2)], ids=str)
def test_file_tensors_has_variants_without_rims_of_zeros(axes: tuple[int, int]) -> None:
    kernel = torch.rand(3, 3, 3, 3) + 1
    order = [*axes, *(axis for axis in range(4) if axis not in axes)]
    padded = pad(kernel.permute([*order[2:], *order[:2]]), (2, 2, 2, 2))
    inverse = sorted(range(4), key=lambda place: [*order[2:], *order[:2]][place])
    (tensor,) = file_tensors({"w": padded.permute(inverse)})
    assert any(variant.shape == kernel.shape and torch.equal(variant, kernel) for variant in tensor.variants)
    assert len(file_tensors({"w": kernel})[0].variants) == 1


def test_file_tensors_of_too_many_tensors_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ModelError, match="over 10000 tensors"):
        file_tensors({str(index): one for index in range(MAX_TENSORS + 1)})


def test_file_tensors_of_zeros_ends() -> None:
    (tensor,) = file_tensors({"w": torch.zeros(9, 9, 9, 9)})
    assert 1 < len(tensor.variants) <= 13


def test_file_tensors_of_hostile_mapping_is_empty() -> None:
    class Hostile(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise ValueError(name)

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    assert file_tensors(Hostile()) == []
