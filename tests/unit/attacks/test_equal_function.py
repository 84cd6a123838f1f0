from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from mtlsign.attacks import AttackerResources, NotApplicableError
from mtlsign.attacks.equal_function import (
    TOLERANCE,
    change_where_preserved,
    function_change,
    preserved_outcome,
)
from mtlsign.attacks.training import trainable_copy
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import network

X = torch.randn(3, 1, 24, 24, generator=torch.Generator().manual_seed(0))


def shifted(model: nn.Module, name: str, size: float) -> nn.Module:
    changed = trainable_copy(model)
    changed.get_parameter(name).data.add_(size)
    return changed


def test_function_change_is_relative_to_the_largest_output() -> None:
    model = network("plain")
    assert function_change(model, model, X) == 0
    expected = max(1.0, float(model(X).detach().abs().max()))
    assert function_change(model, shifted(model, "9.bias", 0.5), X) == pytest.approx(0.5 / expected, rel=1e-4)
    assert function_change(model, model, X, ("negated",)) > TOLERANCE


def test_outcome_of_other_function_or_shape_is_not_applicable(tiny_task: Task) -> None:
    model = network("plain")
    with pytest.raises(NotApplicableError, match=r"outputs differ by \d"):
        preserved_outcome(model, shifted(model, "9.bias", 0.1), tiny_task, AttackerResources(), 0)
    narrow = trainable_copy(model)
    narrow[9] = nn.Linear(3, 4)  # type: ignore[index, operator]
    with pytest.raises(NotApplicableError, match="cannot run"):
        preserved_outcome(model, narrow, tiny_task, AttackerResources(), 0)


def test_parts_that_change_the_function_are_left_out() -> None:
    model = network("plain")

    def change(parts: Sequence[int]) -> nn.Module:
        changed = trainable_copy(model)
        for part in parts:
            changed.get_parameter("9.bias").data.add_(1e-9 if part < 2 else 1.0)
            changed.register_buffer(f"part{part}", torch.zeros(1))
        return changed

    names = {name for name, _ in change_where_preserved(model, change, range(4), X).named_buffers()}
    assert names == {"part0", "part1"}
    names = {name for name, _ in change_where_preserved(model, change, range(2), X).named_buffers()}
    assert names == {"part0", "part1"}
    for parts in ((2, 3), ()):
        with pytest.raises(NotApplicableError, match="no channels of which"):
            change_where_preserved(model, change, parts, X)
