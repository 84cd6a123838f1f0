"""Tasks of generated images: data, losses and quality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.models import architectures
from mtlsign.models.dcgan import DCGAN, LATENT
from mtlsign.models.input_spec import LatentSpec
from mtlsign.tasks import Task, load_task
from mtlsign.tasks.generation import adversarial_loss, generated_images, generation_task
from mtlsign.tasks.generation.metric import FrechetQuality


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("gan-digits")


def network(task: Task, width: int = 8) -> DCGAN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = task.input_spec.architecture_fields
        model = architectures.build(
            architectures.architecture_for("dcgan", **fields, width=width, outputs="images")
        )
    assert isinstance(model, DCGAN)
    return model


def test_batch_has_vectors_and_images_from_minus_one_to_one(task: Task) -> None:
    assert task.input_spec == LatentSpec(LATENT, 1, 8, 8)
    first, again = (task.batch_at("train", 8, 0, augment=False) for _ in range(2))
    assert first.inputs.shape == (8, LATENT) and first.targets.shape == (8, 1, 8, 8)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    assert float(first.targets.min()) == -1 and float(first.targets.max()) > 0.9
    drawn = [task.batch_at("train", 8, 0, augment=True, rank=rank, world=2) for rank in (0, 1)]
    whole = task.batch_at("train", 8, 0, augment=True)
    assert torch.equal(torch.cat([part.inputs for part in drawn]), whole.inputs)
    assert not torch.equal(whole.inputs, first.inputs), "augmentation draws new vectors"


def test_each_loss_term_trains_one_network(task: Task) -> None:
    model, batch = network(task), task.batch_at("train", 8, 0)
    outputs = task.training_outputs(model.train(), batch)
    assert torch.equal(generated_images(outputs), outputs["images"])

    def trained(loss: torch.Tensor) -> set[str]:
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        return {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None}

    assert trained(outputs["real"].sum()) == trained(outputs["generated"].sum()) == {"discriminator"}
    assert trained(outputs["convinced"].sum()) == {"generator"}
    assert trained(task.loss(outputs, batch.targets)) == {"generator", "discriminator"}


def test_loss_of_images_alone_raises_data_error(task: Task) -> None:
    batch = task.batch_at("train", 4, 0)
    with pytest.raises(DataError, match=r"Use Task\.training_outputs"):
        adversarial_loss(network(task)(batch.inputs), batch.targets)


def test_quality_is_one_for_equal_and_zero_for_constant_images(task: Task) -> None:
    images = torch.cat([batch.targets for batch in task.batches("train", 500, shuffle=False)])
    qualities = {}
    constant = images.mean(0, keepdim=True).expand_as(images)
    for name, generated in (("equal", images), ("constant", constant), ("opposite", -images)):
        metric = FrechetQuality(channels=1)
        for part in (slice(0, 300), slice(300, None)):
            metric.update(generated[part], images[part])
        qualities[name] = metric.value()
    assert qualities["equal"] == pytest.approx(1, abs=1e-3)
    assert qualities["constant"] == pytest.approx(0, abs=1e-3)
    assert qualities["opposite"] < 0
    assert FrechetQuality(channels=1).value() == 0


def test_quality_of_states_that_are_added_is_that_of_all_samples(task: Task) -> None:
    images = task.batch_at("train", 64, 0).targets
    generated = images.flip(3)
    whole, first, second = (FrechetQuality(channels=1) for _ in range(3))
    whole.update(generated, images)
    first.update({"images": generated[:30]}, images[:30])
    second.update({"images": generated[30:]}, images[30:])
    first.state += second.state
    assert first.value() == pytest.approx(whole.value()) and first.scores() == pytest.approx(whole.scores())


def test_source_without_square_images_raises_data_error(tiny_task: Task) -> None:
    spec = replace(tiny_task.input_spec, height=12)  # type: ignore[type-var]
    with pytest.raises(DataError, match="has no square images"):
        generation_task(replace(tiny_task, input_spec=spec), name="gan")
