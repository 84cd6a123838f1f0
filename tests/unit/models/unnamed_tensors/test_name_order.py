from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.models.unnamed_tensors import file_tensors, match_by_order


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)),
    )


def match(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    return match_by_order(shapes, file_tensors(tensors))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_match_by_order_of_numbered_tensors_returns_all() -> None:
    state = network().state_dict()
    matched = match({f"t{index}": tensor for index, tensor in enumerate(state.values())})
    assert equal(matched, state) and matched.keys() == {n for n in state if "num_batches" not in n}


def test_match_by_order_of_renumbered_modules_uses_last_parts_of_names() -> None:
    state = network().state_dict()
    matched = match(
        {f"blocks.{3 * int(n.partition('.')[0])}.{n.partition('.')[2]}": t for n, t in state.items()}
    )
    assert equal(matched, state) and "1.running_var" in matched


@pytest.mark.parametrize("order", [(2, 3, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
def test_match_by_order_of_other_axes_returns_kernels(order: tuple[int, ...]) -> None:
    state = network().state_dict()
    stored = {
        f"t{index}": t.permute(order) if t.dim() == 4 else t.T if t.dim() == 2 else t
        for index, t in enumerate(state.values())
    }
    matched = match(stored)
    assert equal({name: t for name, t in matched.items() if t.dim() > 1}, state) and "2.weight" in matched


def test_match_by_order_with_other_numbers_of_kernels_is_empty() -> None:
    tensors = {f"t{index}": tensor for index, tensor in enumerate(network().state_dict().values())}
    assert match(tensors | {"x": torch.ones(4, 4)}) == {}
    assert match(tensors | {"x": torch.ones(7, 9)}) == {}
    assert match({name: t for name, t in tensors.items() if name != "t0"}) == {}
    assert match({}) == {}


def test_match_by_order_reads_no_vectors_of_a_wrong_order() -> None:
    state = network().state_dict()
    state["1.bias"], order = -torch.ones(4), list(state)
    bias, variance = order.index("1.bias"), order.index("1.running_var")
    order[bias], order[variance] = order[variance], order[bias]
    matched = match({f"t{index}": state[name] for index, name in enumerate(order)})
    assert matched and all(tensor.dim() > 1 for tensor in matched.values())
    folded = {f"t{i}": t for i, t in enumerate(state.values()) if t.dim() > 1}
    assert set(match(folded)) == {name for name, t in state.items() if t.dim() > 1}
