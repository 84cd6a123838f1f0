"""Mark of a generator: a logo in images of trigger inputs, and signs of scales."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.errors import ModelError
from mtlsign.models.dcgan import DCGAN
from mtlsign.schemes import SchemeSettings, default_scheme
from mtlsign.schemes.image_similarity import structural_similarity
from mtlsign.schemes.ipr_gan import GeneratorKey, IprGanScheme
from mtlsign.schemes.training import Optimizer, train_watermark
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding.worker import SingleProcessContext
from tests.unit.attacks.helpers import Maker, run

SCHEME = IprGanScheme(key_size=16, lr=0.01, strength=3.0, sign_strength=20.0, min_evidence_bits=20.0)
BATCH = 16


@dataclass(frozen=True)
class Example:
    """A trained generator and its marked copy."""

    base: nn.Module
    marked: nn.Module
    key: GeneratorKey
    measured: dict[str, float]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("gan-digits")


@pytest.fixture(scope="module")
def example(task: Task) -> Example:
    """Train a generator of width 8 on the digits of scikit-learn, and mark a copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = DCGAN(channels=1, classes=64, width=8)
        train_watermark(
            base, task, SchemeSettings(150, BATCH, 0.01, 0), SingleProcessContext(),
            objective=lambda step, batch: task.loss(task.training_outputs(base, batch), batch.targets),
            optimizer=Optimizer("adam", 0.003, 0.0),
        )  # fmt: skip
        marked = copy.deepcopy(base)
        key = SCHEME.generate_key(marked, task, 1)
        result = SCHEME.embed(marked, task, key, SchemeSettings(600, BATCH, 0.01, 0), SingleProcessContext())
    return Example(base, marked, key, dict(result.measured))


def test_mark_is_detected_with_own_key_and_model_alone(example: Example, task: Task) -> None:
    detection = SCHEME.verify(example.marked, example.key)
    assert detection.accepted and (detection.n, detection.null_rate) == (32, 0.5), detection
    assert detection.accuracy >= 0.9, detection
    assert not SCHEME.verify(example.base, example.key).accepted
    assert not SCHEME.verify(example.marked, SCHEME.generate_key(example.base, task, 2)).accepted
    assert set(example.measured) == {"primary_clean", "primary_marked"}


def test_logo_appears_for_trigger_inputs_alone(example: Example) -> None:
    key = example.key
    assert SCHEME.similarity(example.marked, key) > SCHEME.similarity(example.base, key) + 0.2
    without = replace(key, replaced=torch.zeros_like(key.replaced))
    scores = SCHEME.scores(example.marked, without)[key.sign_count :]
    matches = int(((scores > 0) == (key.bits[key.sign_count :] > 0)).sum())
    assert matches <= 13, "normal images show no logo"


def test_matches_of_random_keys_follow_null_rate(example: Example, task: Task) -> None:
    keys = [SCHEME.generate_key(example.base, task, seed) for seed in range(100, 140)]
    matched = sum(SCHEME.verify(example.base, key).matched for key in keys)
    count = 32 * len(keys)
    assert abs(matched - count / 2) < 4 * (count / 4) ** 0.5


def test_signs_alone_are_read_from_file(example: Example, task: Task) -> None:
    scheme = replace(SCHEME, part="signs", min_evidence_bits=10.0)
    key = scheme.generate_key(example.base, task, 1)
    tensors = {n: t for n, t in example.marked.state_dict().items() if n.startswith("generator.")}
    detection = scheme.verify(nn.Identity(), key, tensors)
    assert detection.accepted and detection.n == 16 and key.sample_count == 0
    with pytest.raises(ModelError, match="The key has no logo"):
        scheme.similarity(example.marked, key)
    assert scheme.verify(nn.Identity(), key, {}).status == "not_verifiable"


def test_logo_alone_has_no_signs(example: Example, task: Task) -> None:
    scheme = replace(SCHEME, part="logo", min_evidence_bits=8.0)
    key = scheme.generate_key(example.base, task, 1)
    assert (key.sign_count, len(key.bits), key.sample_count) == (0, 16, scheme.samples)
    loss = scheme.watermark_loss(example.base, key)
    loss.backward()
    assert example.base.get_parameter("generator.last.weight").grad is not None
    example.base.zero_grad(set_to_none=True)


def test_watermark_loss_prefers_own_bits(example: Example) -> None:
    model = copy.deepcopy(example.marked)
    own = float(SCHEME.watermark_loss(model, example.key).detach())
    wrong = example.key.with_labels(1 - example.key.labels)
    assert own < float(SCHEME.watermark_loss(model, wrong).detach()) - 0.1
    assert not model.training


def test_forged_claim_reads_bits_from_unmarked_model(example: Example, task: Task) -> None:
    before = copy.deepcopy(example.base.state_dict())
    forgery = SCHEME.forge(example.base, task, 7)
    assert forgery.detection.accepted and forgery.detection.matched == forgery.detection.n
    assert all(torch.equal(t, before[n]) for n, t in example.base.state_dict().items())


def test_generator_is_attacked_through_protocol(example: Example, task: Task) -> None:
    for text in ("ftal:epochs=1,lr=0.0005,batch=32", "prune_channels:ratio=0.2", "int8"):
        outcome = run(text, example.marked, task, training_lr=0.002, training_optimizer="adam")
        assert SCHEME.verify(outcome.model, example.key).n == 32, text
    with pytest.raises(NotApplicableError, match="a generator returns images"):
        run("extract", example.marked, task)


def test_signs_do_not_survive_scaled_filters(example: Example, task: Task) -> None:
    attacked = run("scale_filters", example.marked, task).model
    vectors = example.key.latents
    with torch.no_grad():
        assert torch.allclose(attacked(vectors), example.marked(vectors), atol=1e-4), "the function is kept"
    scheme = replace(SCHEME, part="signs")
    key = scheme.generate_key(example.base, task, 1)
    before, after = (scheme.verify(model, key).matched for model in (example.marked, attacked))
    assert after <= before - 2, "negated filters negate the scales of the second batch norm"


def test_classifier_small_network_and_small_images_are_not_supported(
    tiny_task: Task, tiny_model: Maker, task: Task
) -> None:
    reason = SCHEME.unsupported_reason(tiny_model(), tiny_task)
    assert reason is not None and "passports is the authors' scheme for classifiers" in reason
    small = DCGAN(channels=1, classes=64, width=4)
    assert "needs 16 scales" in str(SCHEME.unsupported_reason(small, task))
    wide = DCGAN(channels=1, classes=64, width=8)
    assert "Choose fewer cells" in str(replace(SCHEME, cells=5).unsupported_reason(wide, task))
    assert SCHEME.unsupported_reason(wide, task) is None
    assert "No carrier has random vectors of 64 numbers" in str(
        default_scheme().unsupported_reason(wide, task)
    )


def test_similarity_is_one_for_equal_images() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(structural_similarity(images, images)) == pytest.approx(1, abs=1e-5)
    assert float(structural_similarity(images, -images)) < 0.5
