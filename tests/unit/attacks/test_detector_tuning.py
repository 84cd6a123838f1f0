"""Tests of attacks on a detector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.attacks.base import NotApplicableError
from mtlsign.models.architectures import build
from mtlsign.tasks import Task, from_loaders
from tests.unit.attacks.helpers import changed_parameters, run
from tests.unit.models.detector_examples import Objects, cascade_architecture, faster_rcnn


@pytest.fixture(scope="module")
def task() -> Task:
    """Return a task of instances whose attacker has four images."""
    return from_loaders({"train": Objects(12), "attacker": Objects(4, 40), "test": Objects(2, 60)})


@pytest.fixture
def detector() -> nn.Module:
    torch.manual_seed(0)
    return faster_rcnn().eval()


def test_ftdet_freezes_stem_first_stage_and_batch_norms(task: Task) -> None:
    torch.manual_seed(0)
    cascade = build(cascade_architecture()).eval()
    changed = changed_parameters(cascade, run("ftdet:epochs=1,lr=0.01", cascade, task).model)
    body = {name for name in changed if name.startswith("backbone.body.")}
    kernels = {name for name, p in cascade.named_parameters() if "body.layer" in name and p.dim() == 4}
    assert body == {name for name in kernels if "body.layer1" not in name}
    assert "rpn.head.cls_logits.weight" in changed and "roi_heads.box_heads.2.cls_score.weight" in changed


def test_ftdet_of_classifier_is_not_applicable(tiny_task: Task, module: nn.Module) -> None:
    with pytest.raises(NotApplicableError, match="is no detector"):
        run("ftdet:epochs=1", module, tiny_task)


@pytest.mark.parametrize(
    "attack", ["ftal:epochs=1", "tune:steps=2,lr=0.001", "prune:ratio=0.5", "null_space:energy=0.9", "int8"]
)
def test_general_attacks_change_a_detectors_body(attack: str, detector: nn.Module, task: Task) -> None:
    changed = changed_parameters(detector, run(attack, detector, task).model)
    assert "backbone.body.stage2.0.weight" in changed


@pytest.mark.parametrize("attack", ["ftdet:epochs=1", "tune:steps=2,lr=0.001"])
def test_tuning_of_detector_repeats_and_keeps_the_callers_generator(
    attack: str, detector: nn.Module, task: Task
) -> None:
    state = torch.random.get_rng_state()
    first = run(attack, detector, task, seed=3).model
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(1)
    assert changed_parameters(first, run(attack, detector, task, seed=3).model) == set()


def test_attacks_that_mix_or_turn_images_are_not_applicable(detector: nn.Module, task: Task) -> None:
    for attack in ("tune:steps=1,lr=0.001,mixup=0.5", "tune:steps=1,lr=0.001,sam_radius=0.1"):
        with pytest.raises(NotApplicableError, match="A detector cannot be tuned so"):
            run(attack, detector, task)


@pytest.mark.parametrize(
    "attack",
    [
        "bn_reparameterize",
        "bn_fold",
        "scale_filters",
        "scale_inner_channels",
        "permute_channels",
        "dummy_channels",
    ],
)
def test_free_changes_keep_the_feature_maps_of_a_detector(
    attack: str, detector: nn.Module, task: Task
) -> None:
    changed = run(attack, detector, task).model
    before, after = detector.state_dict(), changed.state_dict()
    assert before.keys() != after.keys() or any(not before[n].equal(after[n]) for n in before)
    image = torch.rand(1, 3, 64, 64)
    expected, actual = detector.backbone(image), changed.backbone(image)
    for level, own in expected.items():
        assert torch.allclose(own, actual[level], atol=1e-4)


@pytest.mark.parametrize(
    "attack",
    ["rtll", "rtal", "extract", "decorrelate", "adversarial_training", "neural_cleanse", "turn_input"],
)
def test_attacks_on_logits_are_not_applicable_to_a_detector(
    attack: str, detector: nn.Module, task: Task
) -> None:
    with pytest.raises(NotApplicableError, match=r"detector|boxes"):
        run(attack, detector, task)


def test_regularize_trains_a_detector(detector: nn.Module, task: Task) -> None:
    assert "backbone.body.stage2.0.weight" in changed_parameters(
        detector, run("regularize:epochs=1", detector, task).model
    )
