"""Every comparator embeds, is rejected on the base model and with another key, and can be attacked."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.schemes import SCHEMES, Detection, SchemeSettings, WatermarkScheme, make_scheme
from mtlsign.schemes.training import Optimizer, train_watermark
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.attacks.helpers import Maker, flat_network

#: Options with which a scheme fits the tiny network, and steps in which it embeds.
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "uchida": ({"key_size": 64, "strength": 0.3}, 50),
    "deepsigns": ({"key_size": 32, "strength": 1.0, "lr": 0.003}, 100),
    "reversible": ({"key_size": 64}, 1),
    "riga": ({"key_size": 64, "strength": 1.0, "lr": 0.003, "extractor_lr": 0.01}, 80),
    "greedy_residuals": ({"key_size": 64, "strength": 2.0}, 80),
    "diction": ({"key_size": 64, "lr": 0.003}, 80),
    "neuralmark": ({"key_size": 64, "pooled": 128, "strength": 10.0}, 60),
    "passports": ({"key_size": 64, "passport_images": 8, "samples": 20, "tolerance": 0.2}, 80),
    "zhang_content": ({"key_size": 30}, 40),
    "zhang_noise": ({"key_size": 30}, 40),
    "zhang_unrelated": ({"key_size": 30}, 40),
    "adi": ({"key_size": 40}, 80),
    "li2019": ({"key_size": 40, "size": 3.0}, 300),
    "zhu2020": ({"key_size": 40}, 80),
    "frontier_stitching": ({"key_size": 40, "epsilon": 0.1}, 80),
    "new_label": ({"key_size": 30, "intensity": 0.4}, 40),
}
#: Schemes that are tested in every run; the others are slow tests.
QUICK = {"uchida", "reversible", "neuralmark", "riga", "diction", "adi", "new_label", "passports"}
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TINY]
#: Schemes whose marked model accepts every key: it answers the new class to any perturbation of this size,
#: or all adversarial points of this size right.
ANY_KEY = {"new_label", "frontier_stitching"}
#: Schemes whose key samples share one change and one class, so that they match together or not at all. A
#: random key passes with a probability of about one in so many classes.
SHARED = {"zhang_content", "zhang_noise", "zhang_unrelated", "li2019"}
#: Evidence from which a detection is accepted in these tests.
BITS = 20.0


@dataclass(frozen=True)
class Example:
    """A marked tiny network with its base model and keys."""

    scheme: WatermarkScheme[Any]
    base: nn.Module
    marked: nn.Module
    key: Any
    other_key: Any
    measured: dict[str, float]


_EXAMPLES: dict[str, Example] = {}
_TRAINED: list[nn.Module] = []


def _trained(task: Task, make: Maker) -> nn.Module:
    """Return a network that has learnt the tiny task, trained once."""
    if not _TRAINED:
        model, settings = make(), SchemeSettings(steps=60, batch=16, training_lr=0.02, seed=0)
        with torch.random.fork_rng(devices=[]):
            train_watermark(
                model, task, settings, SingleProcessContext(), optimizer=Optimizer(lr=0.03),
                objective=lambda step, batch: task.loss(model(batch.inputs), batch.targets),
            )  # fmt: skip
        _TRAINED.append(model)
    return _TRAINED[0]


def example(name: str, task: Task, make: Maker) -> Example:
    """Return the marked network of a scheme, embedded once."""
    if name not in _EXAMPLES:
        options, steps = TINY[name]
        scheme = make_scheme(name, min_evidence_bits=BITS, forging_tries=3, **options)
        model = copy.deepcopy(_trained(task, make))
        scheme.prepare_model(model, task)
        key, other = (scheme.generate_key(model, task, seed) for seed in (1, 2))
        base = copy.deepcopy(model)
        settings = SchemeSettings(steps=steps, batch=16, training_lr=0.05, seed=0)
        with torch.random.fork_rng(devices=[]):
            result = scheme.embed(model, task, key, settings, SingleProcessContext())
        _EXAMPLES[name] = Example(scheme, base, model, key, other, dict(result.measured))
    return _EXAMPLES[name]


def test_every_registered_comparator_is_tested() -> None:
    own = {"mtlsign", "mtlsign_keyed", "mtlsign_paper"}
    assert set(TINY) == set(SCHEMES) - own - {"ipr_gan"}, "test_ipr_gan.py tests the scheme for generators"


@pytest.mark.parametrize("name", NAMES)
def test_comparator_embeds_and_rejects_base_model_and_other_key(
    name: str, tiny_task: Task, tiny_model: Maker
) -> None:
    case = example(name, tiny_task, tiny_model)
    marked = case.scheme.verify(case.marked, case.key)
    assert marked.accepted and marked.status == "accepted", marked
    assert marked.accuracy >= 0.95, marked
    assert set(case.measured) == {"primary_clean", "primary_marked"}
    base = case.scheme.verify(case.base, case.key)
    assert name in SHARED or not base.accepted, base
    other = case.scheme.verify(case.marked, case.other_key)
    assert other.n > 0 and (name in SHARED or other.accepted == (name in ANY_KEY)), other


def _has_gradients(loss: Tensor, model: nn.Module) -> bool:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("reversible",)])
def test_watermark_loss_has_gradients_and_prefers_own_labels(
    name: str, tiny_task: Task, tiny_model: Maker
) -> None:
    case = example(name, tiny_task, tiny_model)
    model = copy.deepcopy(case.marked).requires_grad_(True)
    loss = case.scheme.watermark_loss(model, case.key)
    assert loss is not None and loss.dim() == 0
    wrong = case.scheme.watermark_loss(model, case.key.with_labels(1 - case.key.labels))
    assert wrong is not None and float(wrong.detach()) > float(loss.detach())
    assert _has_gradients(wrong, model)
    assert _has_gradients(loss, model) or float(loss.detach()) == 0  # a hinge that every bit satisfies
    assert not model.training


def test_reversible_has_no_loss(tiny_task: Task, tiny_model: Maker) -> None:
    case = example("reversible", tiny_task, tiny_model)
    assert case.scheme.watermark_loss(case.marked, case.key) is None


@pytest.mark.parametrize("name", TINY)
def test_unsupported_network_gives_reason(name: str, tiny_task: Task) -> None:
    scheme = make_scheme(name, key_size=65_536) if name in NARROW else make_scheme(name)
    network: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    if name in TEXTS_ONLY_REASON:
        network, tiny_task = flat_network(), _regression(tiny_task)
    reason = scheme.unsupported_reason(network, tiny_task)
    assert reason is not None and reason.endswith(".")


NARROW = {"uchida", "riga", "greedy_residuals", "neuralmark", "reversible"}
TEXTS_ONLY_REASON = {
    *("zhang_content", "zhang_noise", "zhang_unrelated", "adi", "li2019", "zhu2020", "frontier_stitching"),
    *("new_label", "deepsigns"),
}


def _regression(task: Task) -> Task:
    return replace(task, targets="values")


@pytest.mark.parametrize("name", NAMES)
def test_forgery_is_accepted_only_where_a_commitment_is_needed(
    name: str, tiny_task: Task, tiny_model: Maker
) -> None:
    case = example(name, tiny_task, tiny_model)
    before = copy.deepcopy(case.base.state_dict())
    forgery = case.scheme.forge(case.base, tiny_task, 5)
    assert all(torch.equal(t, before[n]) for n, t in case.base.state_dict().items())
    accepted = forgery is not None and forgery.detection.accepted
    assert accepted == (case.scheme.needs_commitment and name != "new_label"), forgery


@pytest.mark.parametrize("name", ["uchida", "riga", "reversible"])
def test_weight_mark_reads_tensors_of_file(name: str, tiny_task: Task, tiny_model: Maker) -> None:
    case = example(name, tiny_task, tiny_model)
    state = case.marked.state_dict()
    assert case.scheme.verify(case.base, case.key, state) == case.scheme.verify(case.marked, case.key)
    renamed = {f"module.{n}": t for n, t in state.items()}
    detection = case.scheme.verify(case.marked, case.key, renamed)
    assert (detection.status, detection.matched) == ("not_verifiable", 0)
    assert detection.reason is not None and case.key.layer in detection.reason


def test_suspect_of_other_shape_is_not_verifiable(tiny_task: Task, tiny_model: Maker) -> None:
    for name in ("uchida", "diction", "adi"):
        case = example(name, tiny_task, tiny_model)
        suspect = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        detection: Detection = case.scheme.verify(suspect, case.key)
        assert detection.status == "not_verifiable" and detection.reason


def test_supported_network_is_judged_before_its_training(tiny_task: Task, tiny_model: Maker) -> None:
    constant = tiny_model()
    for parameter in constant.parameters():
        parameter.data.zero_()
    for name in ("frontier_stitching", "reversible"):
        scheme = make_scheme(name, key_size=40)
        assert scheme.unsupported_reason(constant, tiny_task) is None, name
        with pytest.raises(ModelError, match=r"points flip the class|histogram that is high enough"):
            scheme.generate_key(constant, tiny_task, 0)
