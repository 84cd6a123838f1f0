from __future__ import annotations

import pytest
from torch import nn

from mtlsign.attacks import AttackerResources, NotApplicableError
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.schemes.zhang import ZhangNoiseScheme
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


def test_overwrite_without_images_for_a_key_is_not_applicable(module: nn.Module, tiny_task: Task) -> None:
    scheme = ZhangNoiseScheme(key_size=65_536)
    with pytest.raises(NotApplicableError, match="The attacker's data give no key: A class has only"):
        run("overwrite:epochs=1", module, tiny_task, scheme=scheme)


def test_overwrite_with_key_size_below_that_of_the_head_is_not_applicable(
    module: nn.Module, tiny_task: Task
) -> None:
    with pytest.raises(NotApplicableError, match="greater than or equal to 128") as raised:
        run("overwrite:epochs=1,n=64", module, tiny_task)
    assert raised.value.field == "n"


def test_overwrite_with_larger_margin_moves_weights_more(module: nn.Module, tiny_task: Task) -> None:
    def moved(margin: float) -> float:
        text = f"overwrite:epochs=20,head=spread,n=128,lambda2=0,images=16,margin={margin}"
        attacked = run(text, module, tiny_task).model
        pairs = zip(attacked.parameters(), module.parameters(), strict=True)
        return float(sum((a - b).detach().square().sum() for a, b in pairs))

    assert moved(16) > 1.1 * moved(2) > 0
