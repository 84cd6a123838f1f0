from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.schemes import SchemeSettings
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import watermark_loss
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.conftest import SIDE
from tests.unit.attacks.helpers import Maker, flat_network


@pytest.fixture
def key(marked_model: Any) -> MTLSignKey:
    return MTLSignKey(detector_for_kit(marked_model[1].kit))


@pytest.fixture
def marked_module(marked_model: Any, tiny_model: Maker) -> nn.Module:
    model = tiny_model()
    model.load_state_dict(marked_model[1].tensors)
    return model.eval()


def test_verify_reports_verdict_of_detector(marked_module: nn.Module, key: MTLSignKey) -> None:
    verdict = verify(marked_module.state_dict(), key.detector)
    detection = MTLSignScheme().verify(marked_module, key)
    assert (detection.matched, detection.n) == (verdict.matches, verdict.n)
    assert detection.evidence_bits == verdict.evidence_bits and detection.accuracy == verdict.accuracy
    assert (detection.status, detection.accepted) == ("accepted", True) == (verdict.status, verdict.accepted)
    strict = MTLSignScheme(min_evidence_bits=1e6).verify(marked_module, key)
    assert (strict.status, strict.accepted) == ("rejected", False)


def test_verify_of_other_architecture_gives_reason(key: MTLSignKey) -> None:
    detection = MTLSignScheme().verify(flat_network(), key)
    assert detection.status == "not_verifiable" and not detection.accepted
    assert detection.reason is not None and detection.accuracy == 0


def test_watermark_loss_is_that_of_key_labels_or_of_others(marked_module: nn.Module, key: MTLSignKey) -> None:
    scheme, detector = MTLSignScheme(), key.detector
    loss = scheme.watermark_loss(marked_module, key)
    kernels = detector.select_weights(dict(marked_module.named_parameters()))
    scores = detector.score_kernels(kernels, differentiable=True)
    assert torch.equal(loss, watermark_loss(scores, detector.labels.float()))
    wrong = key.with_labels(1 - key.labels.float())
    assert bool(scheme.watermark_loss(marked_module, wrong) > loss)
    assert torch.equal(key.labels, detector.labels), "the key itself changed"


def test_generate_key_follows_seed_and_options(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    scheme = MTLSignScheme(head="keyed").with_key_options(key_size=128)
    keys = [scheme.generate_key(model, tiny_task, seed) for seed in (0, 0, 1)]
    assert keys[0].detector.key == keys[1].detector.key != keys[2].detector.key
    assert keys[0].sample_count == len(keys[0].labels) == 128
    free = scheme.with_key_options(head="free", key_size=None).generate_key(model, tiny_task, 0)
    assert free.detector.spec.head.kind == "free" and free.sample_count == 600


def test_embed_marks_model_and_reports_cost(tiny_task: Task, tiny_model: Maker) -> None:
    model, scheme = tiny_model(), MTLSignScheme(head="keyed", key_size=128)
    key = scheme.generate_key(model, tiny_task, 0)
    before = scheme.verify(model, key).accuracy
    settings = SchemeSettings(steps=30, batch=16, training_lr=0.02, seed=0, options={"lambda2": 0.0})
    with torch.random.fork_rng(devices=[]):
        result = scheme.embed(model, tiny_task, key, settings, SingleProcessContext())
    assert scheme.verify(model, key).accuracy > before + 0.2
    assert (result.steps, result.images) == (30, 30 * (128 + 16))
    assert set(result.measured) >= {"primary_clean", "primary_marked"}


def test_unsupported_reason_names_unknown_stages(tiny_task: Task, tiny_model: Maker) -> None:
    assert MTLSignScheme(head="keyed").unsupported_reason(tiny_model(), tiny_task) is None
    assert MTLSignScheme(head="keyed").unsupported_reason(flat_network(), tiny_task) is None
    without_pixels = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4))
    reason = MTLSignScheme(head="keyed").unsupported_reason(without_pixels, tiny_task)
    assert reason is not None and "Sequential" in reason


def test_train_without_mark_changes_weights_and_embeds_no_bits(tiny_task: Task, tiny_model: Maker) -> None:
    settings = SchemeSettings(steps=30, batch=16, training_lr=0.02, seed=0)
    changed, accuracies = {}, {}
    for name in ("embed", "train_without_mark"):
        model, scheme = tiny_model(), MTLSignScheme(key_size=128)
        key = scheme.generate_key(model, tiny_task, 0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            getattr(scheme, name)(model, tiny_task, key, settings, SingleProcessContext())
        changed[name] = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        accuracies[name] = scheme.verify(model, key).accuracy
    assert changed["train_without_mark"] == changed["embed"], "the same layers are trained or frozen"
    assert changed["embed"]
    assert accuracies["embed"] > 0.8 and abs(accuracies["train_without_mark"] - 0.5) < 0.2
