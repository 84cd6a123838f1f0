"""Joint matrices of attention layers whose queries, keys and values are in another order than W0's."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.attention_symmetries import attention_symmetries, reorder_joint_matrices, rotate_stream
from mtlsign.attacks.base import AttackerResources
from mtlsign.models.architectures import architecture_for, build
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.verification.alignment import TransformerAligner, make_aligner
from mtlsign.watermark.verification.alignment.joint_matrices import PartOrder
from mtlsign.watermark.verification.matching import ContentMatcher
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import response_bases
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import text_task
from tests.unit.attacks.transformer_examples import architecture as text_architecture
from tests.unit.watermark.scenarios.exchanged_files import exchanged
from tests.unit.watermark.verification.matching.test_layer_search import noisy_matrices

Tensors = dict[str, Tensor]
ORDERS = [
    PartOrder(places, by_head) for by_head in (False, True) for places in permutations((0, 1, 2))
]  # fmt: skip
VIT = architecture_for("timm/vit_tiny_patch16_224", channels=1, classes=4, size=32)
JOINT, HEAD_SIZE = "blocks.{}.attn.qkv.weight", 64


@cache
def vision_transformer() -> tuple[nn.Module, TransformerAligner, Task]:
    """Return a network, the aligner of its reference, and a task; callers must not change them."""
    torch.manual_seed(0)
    model, images = build(VIT).eval(), torch.rand(64, 1, 32, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape))
    taps = ("blocks.3",)
    reference = make_reference(model, taps, images[:2], bases=response_bases(model, taps, images))
    aligner = make_aligner(build(VIT), taps, reference, images[:2])
    assert isinstance(aligner, TransformerAligner)
    labels = torch.arange(64) % 4
    return model, aligner, from_tensors(images, labels, test=(images, labels))


def read(tensors: Tensors, aligner: TransformerAligner) -> Tensors:
    names = {*aligner.resizable_names, *aligner.further_names}
    return dict(aligner.align({n: t for n, t in tensors.items() if n in names}).kernels)


def reordered(tensors: Tensors, orders: list[PartOrder]) -> Tensors:
    """Return the tensors with one order for each block."""
    result = dict(tensors)
    for block, order in enumerate(orders):
        name = JOINT.format(block)
        result[name] = order.stored(tensors[name], HEAD_SIZE)
    return result


def assert_equal_kernels(actual: Tensors, expected: Tensors) -> None:
    """Compare with a tolerance for a turn that is found from the float16 vectors of the reference."""
    assert actual.keys() == expected.keys()
    for name, kernel in expected.items():
        difference = (actual[name].double() - kernel.double()).norm() / kernel.double().norm()
        assert difference < 0.005, name


def noisy(model: nn.Module) -> Tensors:
    return noisy_matrices(model, ("cls_token", "pos_embed", "patch_embed.proj.weight"))


@pytest.mark.parametrize("order", ORDERS)
def test_order_and_its_inverse_leave_a_matrix_as_it_was(order: PartOrder) -> None:
    matrix = torch.arange(3 * 4 * 5 * 2.0).reshape(-1, 2)
    stored = order.stored(matrix, 5)
    assert torch.equal(order.in_thirds(stored, 5), matrix)
    assert torch.equal(stored, matrix) == (order == PartOrder((0, 1, 2), by_head=False))
    assert torch.equal(order.in_thirds(matrix[1:], 5), matrix[1:])  # no whole heads


def test_heads_are_stored_one_by_one() -> None:
    matrix = torch.arange(12.0).reshape(-1, 1)  # two heads of two rows
    stored = PartOrder((2, 0, 1), by_head=True).stored(matrix, 2).flatten().tolist()
    assert stored == [4, 5, 8, 9, 0, 1, 6, 7, 10, 11, 2, 3]  # keys, values and queries of each head


@pytest.mark.parametrize("first", range(0, len(ORDERS), 4))
@pytest.mark.parametrize("change", ["noise", "free changes"])
def test_kernels_stay_with_another_order_in_each_block(first: int, change: str) -> None:
    model, aligner, task = vision_transformer()
    state = noisy(model) if change == "noise" else dict(model.state_dict())
    expected = read(state, aligner)
    if change == "free changes":
        for attack in (rotate_stream, attention_symmetries):
            model = attack(model, task, AttackerResources(), 3).model
        state = dict(model.state_dict())
    orders = ORDERS[first : first + 4]
    assert_equal_kernels(read(reordered(state, orders), aligner), expected)


@pytest.mark.parametrize("layout", ["thirds", "heads"])
def test_attack_stores_the_rows_of_every_block_in_another_order(layout: str) -> None:
    model, aligner, task = vision_transformer()
    outcome = run(f"reorder_joint_matrices:layout={layout}", model, task)
    state, tensors = model.state_dict(), outcome.tensors
    assert tensors is not None
    changed = {name for name in state if not torch.equal(state[name], tensors[name])}
    assert {JOINT.format(block) for block in range(4)} <= changed
    assert {name for name in changed if name.endswith("weight")} == {
        name for name in state if name.endswith("qkv.weight")
    }
    assert_equal_kernels(read(dict(tensors), aligner), read(dict(state), aligner))


def test_attack_needs_a_joint_matrix() -> None:
    network = build(text_architecture("pre")).eval()
    with pytest.raises(NotApplicableError, match="no joint matrix"):
        reorder_joint_matrices(network, text_task(), AttackerResources(), 0)


@pytest.mark.parametrize("first", [1, 6])
def test_search_among_exchanged_names_reads_other_orders(first: int) -> None:
    model, aligner, _ = vision_transformer()
    state = noisy(model)
    file = exchanged(reordered(state, ORDERS[first : first + 4]))
    views = [view for view in ContentMatcher(model, aligner).views(file) if not view.has_own_order]
    assert views
    assert_equal_kernels(read(dict(views[0].tensors), aligner), read(state, aligner))


def test_search_reads_a_joint_matrix_that_is_stored_as_three() -> None:
    model, aligner, _ = vision_transformer()
    state = noisy(model)
    file = {n: t for n, t in state.items() if "qkv" not in n}
    for block in range(4):
        for number, part in enumerate(state[JOINT.format(block)].chunk(3)):
            file[f"{block}.{number}"] = part.contiguous()
    views = [view for view in ContentMatcher(model, aligner).views(exchanged(file)) if not view.has_own_order]
    assert views
    assert_equal_kernels(read(dict(views[0].tensors), aligner), read(state, aligner))


def test_exchanged_blocks_with_other_orders_get_their_numbers_back() -> None:
    model, aligner, _ = vision_transformer()
    state = noisy(model)
    names = {n: n.replace("blocks.0.", "blocks.x.").replace("blocks.2.", "blocks.0.") for n in state}
    swapped = {
        names[n].replace("blocks.x.", "blocks.2."): t for n, t in reordered(state, ORDERS[7:11]).items()
    }
    (stage,) = aligner.products.stream.parts
    similarities = aligner._block_similarities(swapped, stage)
    assert similarities.argmax(1).tolist() == [2, 1, 0, 3]


def test_other_orders_do_not_make_an_independent_network_a_descendant() -> None:
    _, aligner, _ = vision_transformer()
    for seed in range(5, 7):
        torch.manual_seed(seed)
        state = dict(build(VIT).state_dict())
        names = {*aligner.resizable_names, *aligner.further_names}
        kernels = {n: t for n, t in state.items() if n in names}
        assert not aligner.descent(kernels, aligner.align(kernels)).recognized
