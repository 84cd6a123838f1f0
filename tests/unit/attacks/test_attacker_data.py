from __future__ import annotations

import torch
from torch import nn

from mtlsign.attacks import AttackerResources
from mtlsign.attacks.attacker_data import attacker_view, transform_task
from mtlsign.attacks.pruning_masks import accuracy
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run


def test_attacker_view_holds_attacker_split_and_extra_fraction_alone(
    tiny_task: Task, module: nn.Module
) -> None:
    view = attacker_view(module, tiny_task, AttackerResources(), 0)
    original = tiny_task.splits["attacker"].batch(torch.arange(tiny_task.size("attacker"))).inputs
    for split in ("train", "inner", "attacker", "test", "validation"):
        x = view.splits[split].batch(torch.arange(view.size(split))).inputs
        assert torch.equal(x, original[: len(x)]), split
    larger = attacker_view(module, tiny_task, AttackerResources(extra_data_fraction=0.5), 0)
    extra = round(0.5 * tiny_task.size("train"))
    assert larger.size("attacker") == tiny_task.size("attacker") + extra
    order = torch.randperm(larger.size("attacker"), generator=torch.Generator().manual_seed(0))
    x, y = larger.splits["attacker"].batch(order)
    for place, index in enumerate(order[:20].tolist()):
        single, label = larger.splits["attacker"].batch(torch.tensor([index]))
        assert torch.equal(x[place], single[0]) and y[place] == label[0]
    train = tiny_task.splits["train"].batch(torch.arange(tiny_task.size("train"))).inputs.flatten(1)
    images = larger.splits["attacker"].batch(torch.arange(larger.size("attacker"))).inputs
    added = images[len(original) :].flatten(1)
    assert all(any(torch.equal(x, image) for image in train) for x in added)
    assert len(torch.unique(added, dim=0)) == extra


def test_later_steps_get_images_that_earlier_steps_require(marked_module: nn.Module, tiny_task: Task) -> None:
    text = "transpose_input+negate_input+ftal:epochs=1,batch=16,lr=0.0001"
    done = run(text, marked_module, tiny_task)
    assert done.input_transforms == ("transposed", "negated") and done.steps > 0
    before = accuracy(marked_module, attacker_view(marked_module, tiny_task, AttackerResources(), 0))
    transformed = transform_task(tiny_task, done.input_transforms)
    view = attacker_view(done.model, transformed, AttackerResources(), 0)
    assert accuracy(done.model, view) >= before - 0.1
