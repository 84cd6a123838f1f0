from __future__ import annotations

import torch
from torch import Tensor, nn

from mtlsign.tasks import Task
from tests.unit.attacks.helpers import changed_parameters, run


def norm(model: nn.Module) -> Tensor:
    return torch.stack([p.detach().square().sum() for p in model.parameters() if p.dim() > 1]).sum()


def test_regularize_shrinks_weights(module: nn.Module, tiny_task: Task) -> None:
    tuned = run("regularize:strength=1,epochs=3,lr=0.05,batch=16", module, tiny_task).model
    plain = run("ftal:epochs=3,lr=0.05,batch=16", module, tiny_task).model
    assert float(norm(tuned)) < 0.9 * float(norm(plain))


def test_shift_weights_removes_mean_filter(module: nn.Module, tiny_task: Task) -> None:
    shifted = run("shift_weights:noise=0,epochs=1,lr=1e-9,batch=16", module, tiny_task).model
    for name, layer in shifted.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert float(layer.weight.mean(0).abs().max()) < 1e-5, name


def test_label_smoothing_lowers_confidence(module: nn.Module, tiny_task: Task) -> None:
    x = tiny_task.splits["attacker"].batch(torch.arange(8)).inputs
    confidence = {}
    for smoothing in (0.05, 0.9):
        text = f"label_smoothing:smoothing={smoothing},epochs=10,lr=full,batch=16"
        confidence[smoothing] = float(run(text, module, tiny_task).model(x).softmax(1).max(1).values.mean())
    assert confidence[0.9] < confidence[0.05] - 0.1


def test_adversarial_training_changes_all_layers(module: nn.Module, tiny_task: Task) -> None:
    outcome = run("adversarial_training:epochs=1,batch=16", module, tiny_task)
    assert changed_parameters(module, outcome.model) == {name for name, _ in module.named_parameters()}
