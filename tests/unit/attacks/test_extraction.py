from __future__ import annotations

import torch
from torch import nn

from mtlsign.tasks import Task
from tests.unit.attacks.helpers import attacker_images, run


def test_extract_learns_answers_and_not_labels(module: nn.Module, tiny_task: Task) -> None:
    """The teacher answers one class only; a student that learnt labels would answer several."""
    with torch.no_grad():
        module.fc.bias.fill_(-50.0)  # type: ignore[operator, union-attr]
        module.fc.bias[2] = 50.0  # type: ignore[index, union-attr]
    for answers in ("classes", "probabilities"):
        outcome = run(f"extract:epochs=6,answers={answers},batch=16", module, tiny_task)
        answered = outcome.model(attacker_images(module, tiny_task)).argmax(1)
        assert float((answered == 2).float().mean()) > 0.9


def test_extract_starts_from_random_weights(module: nn.Module, tiny_task: Task) -> None:
    first = run("extract:epochs=1,lr=1e-9,batch=16", module, tiny_task).model
    kernel = module.get_submodule("layer3.0.conv1").weight
    cosine = torch.cosine_similarity(
        first.get_submodule("layer3.0.conv1").weight.flatten(),  # type: ignore[union-attr, operator]
        kernel.flatten(),  # type: ignore[union-attr, operator]
        dim=0,
    )
    assert abs(float(cosine)) < 0.2


def test_extract_into_small_network_has_other_layers(module: nn.Module, tiny_task: Task) -> None:
    outcome = run("extract:epochs=1,network=small,queries=mixtures,batch=16", module, tiny_task)
    assert isinstance(outcome.model, nn.Sequential) and outcome.steps > 0
    assert outcome.model(attacker_images(module, tiny_task)).shape[1] == 4
