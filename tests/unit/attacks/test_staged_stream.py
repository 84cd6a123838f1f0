"""Free changes of networks with stages: the bits of a marked Swin transformer stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtlsign
from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.equal_function import TOLERANCE, function_change
from mtlsign.schemes.mtlsign import MTLSignKey
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import VISION_OPTIONS, run
from tests.unit.models.swin_examples import timm_swin, torchvision_swin
from tests.unit.watermark.scenarios.exchanged_files import exchanged

FREE = "attention_symmetries+rotate_stream+permute_channels+dummy_block:place=3"
MAKERS = {"timm": timm_swin, "torchvision": torchvision_swin}


@pytest.fixture(scope="module")
def marked(tiny_task: Task) -> tuple[nn.Module, MTLSignKey]:
    model = timm_swin()
    result = mtlsign.embed(model, tiny_task, trained=True, identity=Identity.generate(), **VISION_OPTIONS)
    detector = detector_for_kit(result.kit, "tests.unit.models.swin_examples:timm_swin")
    return model, MTLSignKey(detector)


@pytest.mark.parametrize(
    "text",
    ["attention_symmetries", "rotate_stream", "permute_channels", "dummy_block:place=1", FREE],
)
def test_free_change_of_a_marked_swin_keeps_function_and_bits(
    text: str, marked: tuple[nn.Module, MTLSignKey], tiny_task: Task
) -> None:
    model, key = marked
    before = verify(model.state_dict(), key.detector)
    attacked = run(text, model, tiny_task, seed=5).model
    state, own = attacked.state_dict(), model.state_dict()
    assert state.keys() != own.keys() or any(not torch.equal(t, own[name]) for name, t in state.items())
    after = verify(state, key.detector)
    assert before.matches == 128 and after.matches >= 127 and after.accepted
    assert after.evidence_bits >= before.evidence_bits - 9  # readings, and one bit near its threshold


@pytest.mark.parametrize("layout", ["thirds", "heads"])
def test_joint_matrices_in_another_order_keep_every_bit(
    layout: str, marked: tuple[nn.Module, MTLSignKey], tiny_task: Task
) -> None:
    model, key = marked
    outcome = run(f"reorder_joint_matrices:layout={layout}", model, tiny_task)
    assert outcome.tensors is not None
    verdict = verify(outcome.tensors, key.detector)
    assert verdict.accepted and verdict.matches >= 127, verdict


def test_exchanged_names_of_a_marked_swin_cost_no_bits(
    marked: tuple[nn.Module, MTLSignKey], tiny_task: Task
) -> None:
    model, key = marked
    verdict = verify(exchanged(run(FREE, model, tiny_task, seed=5).model.state_dict()), key.detector)
    assert verdict.accepted and verdict.matches >= 127, verdict


def test_free_changes_after_tuning_cost_no_bits(
    marked: tuple[nn.Module, MTLSignKey], tiny_task: Task
) -> None:
    model, key = marked
    tuned = run("ftal:lr=full,epochs=2", model, tiny_task, seed=5, training_lr=1e-3).model
    changed = run(FREE, tuned, tiny_task, seed=5).model
    before, after = (verify(network.state_dict(), key.detector).matches for network in (tuned, changed))
    assert before >= 120 and after >= before - 2


@pytest.mark.parametrize("name", MAKERS)
def test_rotate_stream_turns_every_stage(name: str, tiny_task: Task) -> None:
    model = MAKERS[name]()
    attacked = run("rotate_stream", model, tiny_task, seed=3).model
    images = tiny_task.splits["test"].batch(torch.arange(8)).inputs
    assert function_change(model, attacked, images) < TOLERANCE
    before, after = model.state_dict(), attacked.state_dict()
    for matrix in before:
        if matrix.endswith(("qkv.weight", "reduction.weight", "proj.weight", "head.weight", "fc.weight")):
            change = (after[matrix] - before[matrix]).norm() / before[matrix].norm()
            assert float(change) > 0.5, matrix
    kernel = "patch_embed.proj.weight" if name == "timm" else "features.0.0.weight"
    rows = {tuple(row.flatten().tolist()) for row in before[kernel]}
    assert rows == {tuple(row.flatten().tolist()) for row in after[kernel]}  # behind a norm: an order


@pytest.mark.parametrize("name", MAKERS)
def test_heads_change_places_with_their_relative_positions(name: str, tiny_task: Task) -> None:
    model = MAKERS[name]()
    attacked = run("attention_symmetries", model, tiny_task, seed=4).model
    before, after = model.state_dict(), attacked.state_dict()
    tables = [n for n in before if n.endswith("relative_position_bias_table")]
    swapped = [n for n in tables if torch.equal(after[n], before[n].flip(1))]
    stayed = [n for n in tables if torch.equal(after[n], before[n])]
    assert len(tables) == 4 == len(swapped) + len(stayed) and swapped


@pytest.mark.parametrize(("place", "stage", "count"), [(0, 0, 3), (2, 0, 3), (3, 1, 3), (4, 1, 3)])
def test_dummy_block_is_inserted_in_the_stage_of_its_place(
    place: int, stage: int, count: int, tiny_task: Task
) -> None:
    attacked = run(f"dummy_block:place={place}", timm_swin(), tiny_task).model
    blocks = [len(attacked.get_submodule(f"layers.{number}.blocks")) for number in range(2)]  # type: ignore[arg-type]
    assert blocks[stage] == count and blocks[1 - stage] == 2


def test_dummy_block_after_the_last_block_is_not_applicable(tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match="at least as many blocks"):
        run("dummy_block:place=5", timm_swin(), tiny_task)


def test_rotate_stream_with_a_gain_of_zero_is_not_applicable(tiny_task: Task) -> None:
    model = timm_swin()
    with torch.no_grad():
        model.get_parameter("layers.1.downsample.norm.weight")[3] = 0
    with pytest.raises(NotApplicableError, match="nearly 0"):
        run("rotate_stream", model, tiny_task)
