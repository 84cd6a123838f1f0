from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.attacker_data import TransformedModel, transform_inputs
from mtlsign.attacks.base import Preprocessing
from mtlsign.schemes.new_label import NewLabelScheme
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import attacker_images, run


def test_remove_outputs_keeps_other_answers(module: nn.Module, tiny_task: Task) -> None:
    wider = copy.deepcopy(module)
    NewLabelScheme().prepare_model(wider, tiny_task)
    outcome = run("remove_outputs", wider, tiny_task)
    x = attacker_images(module, tiny_task)
    assert torch.equal(outcome.model(x), module(x)) and wider(x).shape[1] == 5
    with pytest.raises(NotApplicableError, match="no output besides"):
        run("remove_outputs", module, tiny_task)


def test_preprocess_input_changes_queries_alone(module: nn.Module, tiny_task: Task) -> None:
    outcome = run("preprocess_input:kind=quantised,strength=4", module, tiny_task)
    assert [str(change) for change in outcome.input_transforms] == ["quantised[4]"]
    state = module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in outcome.model.state_dict().items())
    x = attacker_images(module, tiny_task)
    assert len(transform_inputs(x, outcome.input_transforms).unique()) <= 4
    smooth = transform_inputs(x, (Preprocessing("smoothed", 3),))
    assert smooth.shape == x.shape and float(smooth.std()) < float(x.std())
    queried = TransformedModel(module, (Preprocessing("smoothed", 3),))
    assert torch.equal(queried(x), module(smooth))


def test_neural_cleanse_unlearns_reconstructed_trigger(module: nn.Module, tiny_task: Task) -> None:
    outcome = run("neural_cleanse:steps=3,epochs=1,batch=16", module, tiny_task)
    assert outcome.steps > 4 * 3 and not torch.equal(
        outcome.model.get_parameter("fc.weight"), module.get_parameter("fc.weight")
    )
