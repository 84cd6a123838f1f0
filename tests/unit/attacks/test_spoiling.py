from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.schemes.adi import AdiScheme
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.helpers import run


def test_spoil_with_opened_key_removes_watermark(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    before = verify(marked_module.state_dict(), key.detector).accuracy
    done = run("spoil:steps=40,batch=16,lr=0.003", marked_module, tiny_task, key=key)
    assert verify(done.model.state_dict(), key.detector).accuracy < before - 0.2


def test_spoil_without_key_is_not_applicable(marked_module: nn.Module, tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match="opened key"):
        run("spoil", marked_module, tiny_task)


def test_spoil_minimises_scheme_loss_on_inverted_labels(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    labels: list[Tensor] = []

    class RecordingScheme(MTLSignScheme):
        def watermark_loss(self, model: nn.Module, key: Any) -> Tensor:
            labels.append(key.labels)
            return super().watermark_loss(model, key)

    text = "spoil:steps=2,batch=16,labels=inverted"
    run(text, marked_module, tiny_task, key=key, scheme=RecordingScheme())
    assert len(labels) == 2 and torch.equal(labels[0], 1 - key.labels.float())


def test_spoil_of_scheme_without_loss_is_not_applicable(
    marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    class LossFreeScheme(MTLSignScheme):
        def watermark_loss(self, model: nn.Module, key: Any) -> Any:
            return None

    with pytest.raises(NotApplicableError, match="no differentiable watermark loss"):
        run("spoil:steps=2,batch=16", marked_module, tiny_task, key=key, scheme=LossFreeScheme())


def test_spoil_leaves_as_many_key_samples_as_an_unmarked_model_answers(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    labels: list[Tensor] = []

    class RecordingScheme(AdiScheme):
        def watermark_loss(self, model: nn.Module, key: Any) -> Tensor | None:
            labels.append(key.labels)
            return super().watermark_loss(model, key)

    scheme = RecordingScheme(key_size=400)
    key = scheme.generate_key(marked_module, tiny_task, 1)
    assert scheme.null_rate(key) == 0.25
    run("spoil:steps=1,batch=16", marked_module, tiny_task, key=key, scheme=scheme)
    assert 0.15 < float(labels[0].mean()) < 0.35
