from __future__ import annotations

import torch
from torch import nn

from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run


def test_ambiguity_trained_head_changes_no_weight_and_needs_commitment(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    done = run("ambiguity_trained_head:steps=60,hidden=16", marked_module, tiny_task)
    assert done.detection is not None and done.detection.accuracy > 0.9
    assert done.detection.status == "needs_commitment" and not done.detection.accepted
    state = done.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in marked_module.state_dict().items())
