"""Tests of attacks in the space of a layer's responses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.base import AttackerResources
from mtlsign.tasks import Task
from mtlsign.watermark.verification.input_moments import input_moments
from tests.unit.attacks.helpers import attacker_images, changed_parameters, flat_network, run


@pytest.fixture
def flat() -> nn.Module:
    """A network without batch norms, so that nothing but the kernels changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flat_network()


def kernel(model: nn.Module, name: str = "0") -> Tensor:
    weight = dict(model.named_parameters())[f"{name}.weight"].detach().double()
    return weight.reshape(len(weight), -1)


def eigenvectors(model: nn.Module, task: Task) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors of the first layer's inputs."""
    covariance = input_moments(model, ["3"], attacker_images(model, task), ["0"])["0"].covariance[0]
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0), vectors.flip(1)


def directions_with(values: Tensor, energy: float) -> int:
    return int((values.cumsum(0) / values.sum() < energy).sum()) + 1


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_null_space_changes_only_weak_directions(noise: float, flat: nn.Module, tiny_task: Task) -> None:
    values, vectors = eigenvectors(flat, tiny_task)
    count = directions_with(values, 0.9)
    assert 0 < count < len(values)
    strong, weak = vectors[:, :count], vectors[:, count:]
    attacked = run(f"null_space:energy=0.9,noise={noise}", flat, tiny_task).model
    before, after = kernel(flat), kernel(attacked)
    torch.testing.assert_close(after @ strong, before @ strong, rtol=0, atol=1e-5)
    if noise:
        assert float((after @ weak - before @ weak).std()) > 0.5 * float(before.std()) * noise
    else:
        assert float((after @ weak).abs().max()) < 1e-5 < float((before @ weak).abs().max())
    assert changed_parameters(flat, attacked) == {"0.weight"}
    # Inputs in the span of the strong directions give the outputs of the marked model.
    inputs = torch.randn(5, count, dtype=torch.float64) @ strong.T
    patches = inputs.float().reshape(5, 1, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(attacked[0](patches), flat[0](patches), rtol=0, atol=1e-4)  # type: ignore[index]


def test_null_space_of_all_variance_keeps_kernels(flat: nn.Module, tiny_task: Task) -> None:
    attacked = run("null_space:energy=0.9999999", flat, tiny_task).model
    torch.testing.assert_close(kernel(attacked), kernel(flat), rtol=0, atol=1e-5)


def test_null_space_of_first_stages_keeps_later_ones(module: nn.Module, tiny_task: Task) -> None:
    attacked = run("null_space:energy=0.9,stages=2", module, tiny_task).model
    changed = changed_parameters(module, attacked)
    assert {name.split(".")[0] for name in changed} == {"conv1", "layer1", "layer2"}
    everything = changed_parameters(module, run("null_space:energy=0.9", module, tiny_task).model)
    kernels = {n for n, p in module.named_parameters() if p.dim() == 4}
    assert changed < everything <= kernels and "layer4.1.conv2.weight" in everything


def test_response_noise_is_large_where_inputs_are_weak(flat: nn.Module, tiny_task: Task) -> None:
    values, vectors = eigenvectors(flat, tiny_task)
    changes = []
    for seed in range(12):
        attacked = run("response_noise:size=0.3,ridge=0.000001", flat, tiny_task, seed=seed).model
        changes.append((kernel(attacked) - kernel(flat)) @ vectors)
    rows = kernel(flat) @ vectors
    response = (rows.square() * values).sum(1, keepdim=True).sqrt()
    # In each direction the change of the response has the same size, 0.3 of the row's in all directions.
    relative = torch.stack(changes) * values.sqrt() / response
    assert float(relative.square().sum(2).mean().sqrt()) == pytest.approx(0.3, rel=0.15)
    sizes = torch.stack(changes).square().mean((0, 1)).sqrt()
    ratio = float((values[0] / values[-1]).sqrt())
    assert float(sizes[-1] / sizes[0]) == pytest.approx(ratio, rel=0.3) and ratio > 1.3


def test_response_noise_of_size_zero_keeps_kernels(flat: nn.Module, tiny_task: Task) -> None:
    attacked = run("response_noise:size=0", flat, tiny_task).model
    torch.testing.assert_close(kernel(attacked), kernel(flat), rtol=0, atol=1e-6)


def normed_network() -> nn.Module:
    """A shallow network with batch norms; in a deep one without training small changes grow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)),
        ).eval()


@torch.no_grad()
def test_mean_shift_keeps_outputs_of_network_with_batch_norms(tiny_task: Task) -> None:
    """New batch statistics undo the shift of the means."""
    model = normed_network()
    images = attacker_images(model, tiny_task)
    recalibrated = run("mean_shift:size=0", model, tiny_task).model
    shifted = run("mean_shift:size=0.05", model, tiny_task).model
    assert changed_parameters(model, shifted) == {"0.weight", "3.weight"}
    expected = recalibrated(images)
    assert float((shifted(images) - expected).norm() / expected.norm()) < 0.1
    # The standardised responses of the first layer change by the given size, their means by much more.
    first, second = recalibrated[:2](images), shifted[:2](images)  # type: ignore[index]
    assert float((second - first).square().mean().sqrt() / first.std()) == pytest.approx(0.05, rel=0.6)
    responses, moved = recalibrated[0](images), shifted[0](images)  # type: ignore[index]
    deviation = responses.std((0, 2, 3))
    assert float(((moved - responses).mean((0, 2, 3)) / deviation).abs().mean()) > 2 * 0.05


def test_low_rank_keeps_share_of_singular_values(module: nn.Module, tiny_task: Task) -> None:
    attacked = dict(run("low_rank:share=0.5", module, tiny_task).model.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.dim() != 4:
            assert torch.equal(parameter, attacked[name]), name
            continue
        before = parameter.detach().flatten(1).double()
        after = attacked[name].detach().flatten(1).double()
        values = torch.linalg.svdvals(before)
        rank = max(1, len(values) // 2)
        assert int((torch.linalg.svdvals(after) > 1e-4 * values[0]).sum()) == rank
        # It is the best approximation of this rank.
        error = float((after - before).square().sum())
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-3, abs=1e-8)


ATTACKS = ("null_space:energy=0.9,noise=1", "response_noise:size=0.2", "mean_shift", "low_rank")


@pytest.mark.parametrize("text", ATTACKS)
def test_attack_depends_on_seed_alone_and_keeps_marked_model(
    text: str, marked_module: nn.Module, tiny_task: Task
) -> None:
    before = copy.deepcopy(marked_module.state_dict())
    first, second, other = (run(text, marked_module, tiny_task, seed=seed).model for seed in (3, 3, 4))
    assert all(torch.equal(t, before[n]) for n, t in marked_module.state_dict().items())
    assert changed_parameters(first, second) == set() and changed_parameters(marked_module, first)
    assert bool(changed_parameters(first, other)) == (text != "low_rank"), "low_rank draws nothing"
    assert not first.training


@pytest.mark.parametrize("text", ["null_space:energy=0.9", "response_noise:size=0.2", "low_rank"])
def test_attack_with_repair_reports_steps_and_returns_towards_outputs(
    text: str, marked_module: nn.Module, tiny_task: Task
) -> None:
    name, _, parameters = text.partition(":")
    repaired = run(f"{name}:{parameters + ',' if parameters else ''}repair_steps=3", marked_module, tiny_task)
    size = len(attacker_images(marked_module, tiny_task))
    assert (repaired.steps, repaired.images) == (3, 3 * min(128, size)) and not repaired.model.training
    plain = run(text, marked_module, tiny_task)
    assert (plain.steps, plain.images) == (0, 0) and changed_parameters(plain.model, repaired.model)


@pytest.mark.parametrize("name", ["null_space", "response_noise", "mean_shift", "low_rank"])
def test_attack_on_network_without_convolutions_is_not_applicable(name: str, tiny_task: Task) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 4)).eval()
    with pytest.raises(NotApplicableError, match="no convolution of two dimensions"):
        run(name, dense, tiny_task)


def test_attacks_read_only_images_of_the_attacker(
    module: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the owner's images were read")

    batch: Callable[..., Any] = type(tiny_task.splits["train"]).batch
    train = tiny_task.splits["train"]
    monkeypatch.setattr(
        type(train), "batch", lambda split, *a, **k: hidden() if split is train else batch(split, *a, **k)
    )
    for text in ATTACKS:
        run(text, module, tiny_task)
    assert AttackerResources().extra_data_fraction == 0
