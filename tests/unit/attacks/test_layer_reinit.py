from __future__ import annotations

import pytest
import torch
from torch import nn

from mtlsign.tasks import Task
from tests.unit.attacks.helpers import attacker_images, cosine, run


@pytest.mark.parametrize(("stages", "parts"), [(1, ("conv1", "layer1")), (2, ("conv1", "layer1", "layer2"))])
def test_reinit_early_layers_replaces_early_weights_alone(
    stages: int, parts: tuple[str, ...], module: nn.Module, tiny_task: Task
) -> None:
    text = f"reinit_early_layers:stages={stages},steps=1,lr=1e-6,batch=16"
    done = run(text, module, tiny_task)
    original = dict(module.named_parameters())
    for name, p in done.model.named_parameters():
        if not name.startswith((*parts, "bn1")):
            assert torch.equal(p, original[name]), name
        elif p.dim() > 1:
            assert abs(cosine(p, original[name])) < 0.4, name


def test_reinit_early_layers_learns_marked_features(module: nn.Module, tiny_task: Task) -> None:
    x = attacker_images(module, tiny_task)

    def error(steps: int) -> float:
        model = run(f"reinit_early_layers:steps={steps},batch=16", module, tiny_task).model
        with torch.no_grad():
            actual, target = (nn.Sequential(*list(m.children())[:5])(x) for m in (model, module))
        return float((actual - target).square().mean() / target.var())

    assert error(20) < 0.7 * error(1)
