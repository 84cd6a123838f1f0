from __future__ import annotations

import copy

import torch

from mtlsign.schemes import SchemeSettings
from mtlsign.schemes.reversible import ReversibleScheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.attacks.helpers import Maker


def test_restore_returns_base_weights_exactly(tiny_task: Task, tiny_model: Maker) -> None:
    scheme, model = ReversibleScheme(key_size=64), tiny_model()
    key, base = scheme.generate_key(model, tiny_task, 1), copy.deepcopy(tiny_model().state_dict())
    scheme.embed(model, tiny_task, key, SchemeSettings(1, 16, 0.1, 0), SingleProcessContext())
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, base[name])]
    assert changed == [f"{key.layer}.weight"]
    assert scheme.verify(model, key).accuracy == 1.0
    scheme.restore(model, key)
    assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())


def test_tuned_model_loses_mark(tiny_task: Task, tiny_model: Maker) -> None:
    scheme, model = ReversibleScheme(key_size=64), tiny_model()
    key = scheme.generate_key(model, tiny_task, 1)
    scheme.embed(model, tiny_task, key, SchemeSettings(1, 16, 0.1, 0), SingleProcessContext())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    assert not scheme.verify(model, key).accepted
