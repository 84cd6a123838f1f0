from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import run


def test_average_models_with_fitting_model_gives_mean(marked_module: nn.Module, tiny_task: Task) -> None:
    state: dict[str, Tensor] = marked_module.state_dict()
    other = {n: 3 * t if t.is_floating_point() else t for n, t in state.items()}
    done = run("average_models:bn=kept", marked_module, tiny_task, other_models=[other])
    assert torch.allclose(done.model.state_dict()["conv1.weight"], 2 * state["conv1.weight"])


def test_average_models_without_enough_fitting_models_is_not_applicable(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    other = {n: 3 * t if t.is_floating_point() else t for n, t in marked_module.state_dict().items()}
    for others, text in (
        ([], "average_models"),
        ([other], "average_models:copies=2"),
        ([{"x": torch.ones(1)}], "average_models"),
    ):
        with pytest.raises(NotApplicableError):
            run(text, marked_module, tiny_task, other_models=others)
