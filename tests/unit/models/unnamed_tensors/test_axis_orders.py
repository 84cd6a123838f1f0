from __future__ import annotations

import itertools

import pytest
import torch

from mtlsign.models.unnamed_tensors import axis_orders, in_axis_order, is_stored_as

SHAPE = (4, 3, 2, 5)


@pytest.mark.parametrize("order", axis_orders(4), ids=str)
def test_in_axis_order_of_permuted_kernel_returns_kernel(order: tuple[int, ...]) -> None:
    kernel = torch.randn(SHAPE)
    stored = kernel.permute(order).contiguous()
    for joined in (stored, stored.flatten(1), stored.flatten(0, 2), stored.flatten(1, 2), stored.flatten()):
        assert is_stored_as(tuple(joined.shape), SHAPE, order)
        assert torch.equal(in_axis_order(joined, SHAPE, order), kernel)


def test_is_stored_as_of_other_shape_is_false() -> None:
    order = axis_orders(4)[0]
    wrong = ((4, 3, 5, 2), (3, 4, 2, 5), (4, 6, 5, 1, 2), (4, 3, 2), (4, 3, 2, 5, 2), (2, 2, 3, 2, 5), ())
    assert not any(is_stored_as(shape, SHAPE, order) for shape in wrong)
    assert not is_stored_as((0, 3, 2, 5), SHAPE, order)


def test_axes_of_length_1_do_not_count() -> None:
    matrix = torch.randn(4, 3)
    for stored in (matrix, matrix[:, :, None, None], matrix[None]):
        assert is_stored_as(tuple(stored.shape), (4, 3, 1, 1), axis_orders(4)[0])
        assert torch.equal(in_axis_order(stored, (4, 3, 1, 1), axis_orders(4)[0])[:, :, 0, 0], matrix)
    assert torch.equal(in_axis_order(matrix.T, (4, 3), axis_orders(2)[1]), matrix)


def test_axis_orders_are_different_permutations_that_begin_with_the_own_one() -> None:
    for dimensions in (1, 2, 4, 5):
        orders = axis_orders(dimensions)
        assert orders[0] == tuple(range(dimensions)) and len(set(orders)) == len(orders)
        assert set(orders) <= set(itertools.permutations(range(dimensions)))
