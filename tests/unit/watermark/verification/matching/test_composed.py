"""Kernels of two tensors without names, among many that fit."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.unnamed_tensors import FileTensor, file_tensors
from mtlsign.watermark.verification.matching import ContentMatcher
from mtlsign.watermark.verification.matching.composed import MAX_PAIRS, ComposedShape, composed_kernel
from tests.unit.watermark.verification.test_alignment import aligner_and_suspect


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def files(*shapes: tuple[int, ...]) -> list[FileTensor]:
    return file_tensors({f"t{i}": numbers(*shape, seed=i) for i, shape in enumerate(shapes)})


def shape_of(window: tuple[int, ...], rank: int = 16) -> ComposedShape:
    return ComposedShape(6, lambda rows: rows == 4, window, rank)


def places(pairs: list[tuple[FileTensor, FileTensor]]) -> list[tuple[int, int]]:
    return [(first.place, second.place) for first, second in pairs]


@pytest.mark.parametrize("order", ["alternating", "apart"])
def test_pairs_are_those_with_the_nearest_names(order: str) -> None:
    one, other = (5, 6, 3, 3), (4, 5, 1, 1)
    shapes = [one, other] * 40 if order == "alternating" else [one] * 40 + [other] * 40
    tensors = files(*shapes)
    firsts, seconds = ([i for i, shape in enumerate(shapes) if shape == kind] for kind in (one, other))
    fitting = sorted(itertools.product(firsts, seconds), key=lambda pair: (abs(pair[0] - pair[1]), *pair))
    assert places(shape_of((3, 3)).pairs(tensors)) == fitting[:MAX_PAIRS]


def test_pairs_need_equal_ranks_and_one_window() -> None:
    tensors = files((5, 6, 3, 3), (4, 5), (4, 5, 3, 3), (7, 5), (4, 7, 1, 1), (5, 6, 1, 3), (4, 5, 3, 1))
    assert places(shape_of((3, 3)).pairs(tensors)) == [(0, 1), (5, 6)]
    assert places(shape_of((3, 3), rank=4).pairs(tensors)) == [] == places(shape_of(()).pairs(tensors))
    assert places(shape_of(()).pairs(files((5, 6), (4, 5), (5,), (4, 5, 1)))) == [(0, 1)]


@pytest.mark.parametrize("windows", [((1, 1), (3, 3)), ((3, 1), (1, 3)), ((3, 3), (1, 1))])
def test_kernel_of_two_layers_computes_what_they_do(windows: tuple[tuple[int, int], ...]) -> None:
    first, second = numbers(5, 6, *windows[0]).double(), numbers(4, 5, *windows[1], seed=1).double()
    inputs = numbers(2, 6, 9, 9, seed=2).double()
    expected = torch.nn.functional.conv2d(torch.nn.functional.conv2d(inputs, first), second)
    kernel = composed_kernel(first, second, (3, 3))
    torch.testing.assert_close(torch.nn.functional.conv2d(inputs, kernel), expected)


def test_pairs_of_thousands_of_fitting_tensors_are_not_all_listed() -> None:
    tensors = files(*[(8, 6, 3, 3), (4, 8)] * 3000)
    start = time.process_time()
    assert len(shape_of((3, 3)).pairs(tensors)) == MAX_PAIRS
    assert time.process_time() - start < 3


@pytest.mark.parametrize("shapes", [((8, 8), (8, 8, 3, 3)), ((8, 1, 3, 3), (8, 8))])
@pytest.mark.timeout(600)
def test_views_of_thousands_of_fitting_tensors_end_in_bounded_time(
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    aligner, _ = aligner_and_suspect("resnet")
    file = {f"d{i}": numbers(*shapes[i % len(shapes)], seed=i) for i in range(1500)}
    start = time.process_time()
    try:
        views = ContentMatcher(torch.nn.Sequential(), aligner).views(file)
    except ModelError as error:
        views = []
        assert "Too many tensors" in str(error)
    assert views == [] and time.process_time() - start < 60
