from __future__ import annotations

import pytest
import torch

from mtlsign.schemes import SchemeSettings, make_scheme
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.attacks.helpers import Maker


@pytest.mark.parametrize(
    ("name", "kind", "n"), [("mtlsign_keyed", "keyed", 1024), ("mtlsign_paper", "free", 600)]
)
def test_preset_has_head_and_key_size_of_embed_settings(
    tiny_task: Task, tiny_model: Maker, name: str, kind: str, n: int
) -> None:
    detector = make_scheme(name).generate_key(tiny_model(), tiny_task, 0).detector
    assert (detector.spec.head.kind, len(detector.labels)) == (kind, n)


def test_preset_keyed_equals_default_scheme_with_keyed_head(tiny_task: Task, tiny_model: Maker) -> None:
    keyed, other = make_scheme("mtlsign_keyed"), MTLSignScheme(head="keyed")
    model = tiny_model()
    keys = [scheme.generate_key(model, tiny_task, 3).detector.key for scheme in (keyed, other)]
    assert keys[0] == keys[1]


def test_paper_preset_accepts_marked_model_as_committed(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), make_scheme("mtlsign_paper", key_size=128, min_evidence_bits=40)
    key, other = (scheme.generate_key(model, tiny_task, seed) for seed in (0, 1))
    settings = SchemeSettings(steps=80, batch=16, training_lr=0.02, seed=0, options={"lambda2": 0.0})
    with torch.random.fork_rng(devices=[]):
        scheme.embed(model, tiny_task, key, settings, SingleProcessContext())
    marked, wrong = scheme.verify(model, key), scheme.verify(model, other)
    assert marked.accepted and marked.status == "needs_commitment", marked
    assert not wrong.accepted and wrong.status != "needs_commitment", wrong
    assert not MTLSignScheme(min_evidence_bits=40).verify(model, key).accepted


def test_paper_preset_is_forged_by_training_a_head(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forgery = make_scheme("mtlsign_paper", key_size=128, min_evidence_bits=40).forge(model, tiny_task, 5)
    assert forgery.detection.accepted and forgery.tries == 1, forgery
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
