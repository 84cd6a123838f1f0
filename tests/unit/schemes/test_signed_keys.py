"""Keys that are bound to a hash or a signature cannot be changed afterwards."""

from __future__ import annotations

from dataclasses import replace

import torch

from mtlsign.schemes.base import SchemeSettings
from mtlsign.schemes.greedy_residuals import GreedyResidualsScheme
from mtlsign.schemes.li2019 import Li2019Scheme
from mtlsign.schemes.neuralmark import NeuralMarkScheme, hashed_bits
from mtlsign.schemes.training import accuracies
from mtlsign.schemes.zhu2020 import Zhu2020Scheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.attacks.helpers import Maker


def test_greedy_residuals_key_with_other_bits_is_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    scheme, model = GreedyResidualsScheme(key_size=64), tiny_model()
    key = scheme.generate_key(model, tiny_task, 1)
    assert key.is_signed and scheme.verify(model, key).status == "rejected"
    for forged in (replace(key, bits=1 - key.bits), replace(key, statement=b"another owner")):
        detection = scheme.verify(model, forged)
        assert (detection.status, detection.accepted) == ("not_verifiable", False)


def test_neuralmark_bits_are_hash_of_matrix(tiny_task: Task, tiny_model: Maker) -> None:
    key = NeuralMarkScheme(key_size=64, pooled=128).generate_key(tiny_model(), tiny_task, 1)
    assert torch.equal(hashed_bits(key.projection), key.bits)
    changed = key.projection.clone()
    changed[0, 0] += 1
    assert not torch.equal(hashed_bits(changed), key.bits)


def test_zhu_samples_outside_of_chain_are_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    scheme, model = Zhu2020Scheme(key_size=5), tiny_model()
    key = scheme.generate_key(model, tiny_task, 1)
    assert scheme.verify(model, key).status == "rejected"
    fitted = replace(key, classes=(key.classes + 1) % 4)
    assert scheme.verify(model, fitted).status == "not_verifiable"


def test_li_measures_accuracy_of_given_model_before_its_weights_are_drawn_again(
    tiny_task: Task, tiny_model: Maker
) -> None:
    scheme, model, worker = Li2019Scheme(key_size=5), tiny_model(), SingleProcessContext()
    expected = accuracies(model, tiny_task, worker, "clean")
    key = scheme.generate_key(model, tiny_task, 1)
    measured = scheme.embed(model, tiny_task, key, SchemeSettings(1, 16, 0.02, 0), worker).measured
    assert measured["primary_clean"] == expected["primary_clean"] != measured["primary_marked"]


def test_li_key_without_signature_is_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    scheme, model = Li2019Scheme(key_size=5), tiny_model()
    key = scheme.generate_key(model, tiny_task, 1)
    assert scheme.verify(model, replace(key, signature=bytes(64))).status == "not_verifiable"
