"""Networks whose tensors have names without meaning: matched by sketches, whatever their layout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.watermark.verification.alignment import Aligner
from mtlsign.watermark.verification.matching import ContentMatcher
from mtlsign.watermark.verification.matching.sketch_search import WorkLimit
from tests.unit.models.channel_permutation import permuted_copy
from tests.unit.watermark.verification.test_alignment import (
    NETWORKS,
    aligner_and_suspect,
    kernels_of,
    signed,
    turned,
)

Tensors = dict[str, Tensor]


def anonymous(tensors: Tensors, seed: int = 0) -> Tensors:
    """Give each tensor a number without any order as its name."""
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed)).tolist()
    return {f"t{number}": tensor for number, tensor in zip(order, tensors.values(), strict=True)}


def by_sketches(aligner: Aligner, file: Tensors) -> Tensors:
    """Return the kernels that are found by sketches, in W0's order."""
    views = ContentMatcher(nn.Sequential(), aligner).views(file)
    return dict(aligner.align(views[-1].tensors).kernels) if views else {}


def factored(kernel: Tensor) -> Tensors:
    """Return two layers, one after the other, whose product is a kernel."""
    mix = torch.linalg.qr(torch.randn(len(kernel), len(kernel), dtype=torch.float64)).Q
    inner = (mix.T @ kernel.double().flatten(1)).reshape(kernel.shape)
    return {"a": inner.float(), "b": mix.reshape(len(kernel), -1, *[1] * (kernel.dim() - 2)).float()}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "own": lambda kernel: kernel,
    "HWIO and transposed": lambda kernel: kernel.permute(2, 3, 1, 0) if kernel.dim() == 4 else kernel.T,
    "OHWI, flat": lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1) if kernel.dim() == 4 else kernel,
    "one axis": lambda kernel: kernel.flatten(),
    "padded": lambda kernel: torch.nn.functional.pad(kernel, (1, 1, 1, 1)) if kernel.dim() == 4 else kernel,
}


@pytest.mark.parametrize(("name", "layout", "permuted"), [
    *(("mixed", layout, False) for layout in LAYOUTS),
    ("resnet", "HWIO and transposed", True), ("resnet", "OHWI, flat", False), ("mixed", "own", True),
])  # fmt: skip
def test_views_of_renamed_network_give_the_kernels_before(name: str, layout: str, permuted: bool) -> None:
    aligner, suspect = aligner_and_suspect(name)
    expected = signed(suspect, aligner)
    changed = permuted_copy(suspect, aligner.sets) if permuted else suspect
    file = {key: LAYOUTS[layout](kernel) for key, kernel in kernels_of(changed, aligner).items()}
    aligned = by_sketches(aligner, anonymous(file))
    assert aligned.keys() == expected.keys()
    for key, kernel in expected.items():
        torch.testing.assert_close(aligned[key], kernel, msg=key)


def test_views_of_renamed_network_for_turned_images_give_the_kernels_before() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected = signed(suspect, aligner)
    kernels = turned(kernels_of(permuted_copy(suspect, aligner.sets), aligner), aligner)
    kernels["conv1.weight"] = -kernels["conv1.weight"][:, [2, 0, 1]]
    aligned = by_sketches(aligner, anonymous(kernels))
    for key, kernel in expected.items():
        torch.testing.assert_close(aligned[key], kernel, msg=key)


def test_views_of_factorised_layers_give_their_products() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected = signed(suspect, aligner)
    changed = permuted_copy(suspect, aligner.sets)
    file = {}
    for number, kernel in enumerate(kernels_of(changed, aligner).values()):
        file |= {f"t{number}.{part}": tensor for part, tensor in factored(kernel).items()}
    aligned = by_sketches(aligner, file)
    for key, kernel in expected.items():
        torch.testing.assert_close(aligned[key], kernel, msg=key, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_views_find_the_network_among_decoys_of_equal_shapes_in_bounded_time() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected = signed(suspect, aligner)
    kernels = kernels_of(permuted_copy(suspect, aligner.sets), aligner)
    generator = torch.Generator().manual_seed(0)
    file = {
        f"x{i}.{n}": torch.randn(t.shape, generator=generator) for n, t in kernels.items() for i in range(12)
    }
    start = time.process_time()
    aligned = by_sketches(aligner, anonymous(file | kernels))
    assert time.process_time() - start < 60
    for key, kernel in expected.items():
        torch.testing.assert_close(aligned[key], kernel, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_views_of_independent_networks_are_empty(name: str) -> None:
    aligner, _ = aligner_and_suspect(name)
    for seed in range(1, 2 if name == "resnet" else 3):
        assert by_sketches(aligner, anonymous(kernels_of(NETWORKS[name](seed), aligner))) == {}
    generator = torch.Generator().manual_seed(0)
    shapes = [layer.shape for layer in aligner.layers.values()]
    file = {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes * 3)}
    assert by_sketches(aligner, file) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda kernel: kernel * math.nan,
        torch.zeros_like,
        lambda kernel: kernel[:1, :1],
        lambda kernel: torch.ones(1).expand(10**9),
        lambda kernel: torch.ones(1, device="meta").expand(2**40),
    ],
    ids=["nan", "zeros", "shape", "expanded", "meta"],
)
def test_views_of_damaged_layer_miss_that_layer_alone(damage: Callable[[Tensor], Tensor]) -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected, kernels = signed(suspect, aligner), kernels_of(suspect, aligner)
    name = "layer2.1.conv1.weight"
    kernels[name] = damage(kernels[name])
    aligned = by_sketches(aligner, anonymous(kernels))
    assert expected.keys() - aligned.keys() == {name}
    torch.testing.assert_close(aligned["layer4.0.conv2.weight"], expected["layer4.0.conv2.weight"])


def test_views_have_the_same_kernels_for_every_order_of_the_file() -> None:
    aligner, suspect = aligner_and_suspect("mixed")
    file = anonymous(kernels_of(permuted_copy(suspect, aligner.sets), aligner))
    one, other = by_sketches(aligner, file), by_sketches(aligner, dict(reversed(file.items())))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_views_of_further_channels_give_the_kernels_before() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected, kernels = signed(suspect, aligner), kernels_of(suspect, aligner)
    rows, columns = kernels["layer1.0.conv1.weight"], kernels["layer1.0.conv2.weight"]
    kernels["layer1.0.conv1.weight"] = torch.cat((rows, torch.randn(2, *rows.shape[1:])))
    kernels["layer1.0.conv2.weight"] = torch.cat((columns, torch.zeros_like(columns[:, :2])), 1)
    aligned = by_sketches(aligner, anonymous(kernels))
    for key in ("layer1.0.conv1.weight", "layer1.0.conv2.weight"):
        torch.testing.assert_close(aligned[key], expected[key], msg=key)


def test_work_limit_ends_a_search() -> None:
    work = WorkLimit(10)
    work.use(10)
    with pytest.raises(ModelError, match="Too many tensors"):
        work.use(1)
