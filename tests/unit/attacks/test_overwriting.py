from __future__ import annotations

from torch import nn

from mtlsign.attacks import AttackerResources
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run


def test_overwrite_embeds_second_key_in_given_number_of_steps(module: nn.Module, tiny_task: Task) -> None:
    steps: list[int] = []

    def overwritten(epochs: int) -> nn.Module:
        text = f"overwrite:epochs={epochs},head=keyed,n=128,lambda2=0,images=16"
        return run(text, module, tiny_task, on_step=lambda step, _: steps.append(step)).model

    view = attacker_view(module, tiny_task, AttackerResources(), 0)
    key = MTLSignScheme(head="keyed", key_size=128).generate_key(module, view, 0)
    models = (module, overwritten(1), overwritten(50))
    accuracies = [verify(model.state_dict(), key.detector).accuracy for model in models]
    assert accuracies[0] < 0.65 and accuracies[1] < 0.75 and accuracies[2] > 0.9
    assert max(steps) == 50
