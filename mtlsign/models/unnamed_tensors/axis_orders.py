"""Orders in which files of other libraries store the axes of a kernel.

PyTorch stores the kernel of a convolution as [O, I, height, width] and that of a linear layer as [O, I].
Others store the inputs last or the outputs last, and join neighbouring axes into one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

#: Axes of [O, I, height, width] in the order in which a file has them: OIHW, OHWI, HWIO, IOHW, HWOI, IHWO.
_CONVOLUTION_ORDERS = (
    *((0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0)),
    *((1, 0, 2, 3), (2, 3, 0, 1), (1, 2, 3, 0)),
)
_MATRIX_ORDERS = ((0, 1), (1, 0))


def axis_orders(dimensions: int) -> Sequence[tuple[int, ...]]:
    """Return the orders of axes for kernels with so many dimensions; the first is PyTorch's own."""
    if dimensions == 4:
        return _CONVOLUTION_ORDERS
    return _MATRIX_ORDERS if dimensions == 2 else (tuple(range(dimensions)),)


def is_stored_as(stored: Sequence[int], shape: Sequence[int], order: Sequence[int]) -> bool:
    """Return whether a tensor can be a kernel with its axes in another order.

    Neighbouring axes can be joined into one. Axes of length 1 do not count.

    Args:
        stored: shape of the tensor in the file.
        shape: shape of the kernel.
        order: one of `axis_orders`.
    """
    target = [shape[axis] for axis in order if shape[axis] != 1]
    place = 0
    for size in stored:
        if size == 1:
            continue
        product = 1
        while product < size and place < len(target):
            product *= target[place]
            place += 1
        if product != size:
            return False
    return place == len(target)


def in_axis_order(tensor: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return a tensor of the file as a kernel of a shape; see `is_stored_as`, which must hold."""
    sizes = [shape[axis] for axis in order]
    inverse = sorted(range(len(order)), key=lambda place: order[place])
    return tensor.reshape(sizes).permute(inverse)
