"""Tests of long tuning by distillation and of training from random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.distilled_tuning import _ascended
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import distillation_loss
from tests.unit.attacks.helpers import attacker_images, changed_parameters, cosine, flat_network, run


@torch.no_grad()
def distance(model: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Return the distillation loss of two models in evaluation mode."""
    return float(distillation_loss(model(images), teacher(images), 2.0))


@pytest.mark.parametrize(
    "text",
    [
        "tune:steps=3,batch=8",
        "tune:steps=3,batch=8,mixup=0.5",
        "tune:steps=3,batch=8,sam_radius=0.05",
        "tune:steps=3,batch=8,ema_decay=0.9,weight_decay=0.01",
        "tune:steps=2,batch=4,labels=0,ewc=10",
        "relearn:epochs=1,batch=8",
        "relearn:epochs=1,batch=8,start=shrink_perturb",
        "relearn:epochs=1,batch=8,optimizer=adam,lr=0.01,weight_decay=0.005",
    ],
)
def test_attack_is_deterministic_in_seed_and_keeps_marked_model(
    text: str, marked_module: nn.Module, tiny_task: Task
) -> None:
    before = copy.deepcopy(marked_module.state_dict())
    rng_state = torch.random.get_rng_state()
    first, second, other = (run(text, marked_module, tiny_task, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(rng_state, torch.random.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in marked_module.state_dict().items())
    state = first.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in second.model.state_dict().items())
    assert changed_parameters(first.model, other.model) and changed_parameters(marked_module, first.model)
    assert not first.model.training and all(p.requires_grad for p in first.model.parameters())
    assert all(torch.isfinite(t).all() for t in state.values())


def test_tune_reports_steps_and_images(marked_module: nn.Module, tiny_task: Task) -> None:
    seen: list[tuple[int, int]] = []
    done = run("tune:steps=3,batch=8", marked_module, tiny_task, on_step=lambda a, b: seen.append((a, b)))
    assert (done.steps, done.images) == (3, 24) and seen == [(1, 3), (2, 3), (3, 3)]
    size = len(attacker_images(marked_module, tiny_task))
    epoch = run("relearn:epochs=2,batch=8", marked_module, tiny_task)
    batch = min(8, size)
    assert epoch.steps == 2 * (size // batch) and epoch.images == epoch.steps * batch


def test_tune_trains_all_weights_towards_lower_loss(marked_module: nn.Module, tiny_task: Task) -> None:
    """From a network with noise, distillation leads back towards the outputs of the marked model."""
    done = run("tune:steps=30,lr=0.01,batch=12,distillation=0", marked_module, tiny_task).model
    assert changed_parameters(marked_module, done) == {n for n, _ in marked_module.named_parameters()}
    (x, y), *_ = list(tiny_task.batches("attacker", 256, shuffle=False))
    with torch.no_grad():
        before, after = F.cross_entropy(marked_module(x), y), F.cross_entropy(done(x), y)
    assert float(after) < float(before)


def test_tune_without_labels_stays_nearer_to_marked_outputs(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    images = attacker_images(marked_module, tiny_task)
    text = "tune:steps=20,lr=0.01,batch=12,labels={},distillation={}"
    distilled = run(text.format(0, 1), marked_module, tiny_task).model
    labelled = run(text.format(1, 0), marked_module, tiny_task).model
    assert distance(distilled, marked_module, images) < distance(labelled, marked_module, images)


def test_tune_with_elastic_weight_consolidation_moves_weights_less(
    marked_module: nn.Module, tiny_task: Task
) -> None:
    def moved(ewc: float) -> float:
        model = run(f"tune:steps=6,lr=0.003,batch=8,ewc={ewc}", marked_module, tiny_task).model
        original = dict(marked_module.named_parameters())
        changes = [(p - original[n]).detach().flatten() for n, p in model.named_parameters()]
        return float(torch.cat(changes).norm())

    assert moved(1e6) < moved(0)


def test_tune_with_average_stays_nearer_to_marked_weights(marked_module: nn.Module, tiny_task: Task) -> None:
    plain = run("tune:steps=6,batch=8", marked_module, tiny_task).model
    averaged = run("tune:steps=6,batch=8,ema_decay=0.9", marked_module, tiny_task).model
    name = "layer1.0.conv1.weight"
    original = marked_module.get_parameter(name)
    near, far = (float((m.get_parameter(name) - original).detach().norm()) for m in (averaged, plain))
    assert 0 < near < far


def test_ascended_moves_each_tensor_along_its_gradient() -> None:
    parameters = {"a": torch.randn(4, 3).requires_grad_(True), "b": torch.randn(5).requires_grad_(True)}
    loss = (parameters["a"] ** 3).sum() + 7 * parameters["b"].square().sum()
    moved = _ascended(parameters, loss, 0.1)
    for name, gradient in (("a", 3 * parameters["a"] ** 2), ("b", 14 * parameters["b"])):
        change = (moved[name] - parameters[name]).detach()
        assert cosine(change, gradient) == pytest.approx(1, abs=1e-5)
        assert float(change.norm() / parameters[name].detach().norm()) == pytest.approx(0.1, rel=1e-4)


def test_relearn_starts_from_random_weights(marked_module: nn.Module, tiny_task: Task) -> None:
    text = "relearn:epochs=1,batch=8,lr=0.0001"
    student = dict(run(text, marked_module, tiny_task).model.named_parameters())
    shrunk = dict(run(f"{text},start=shrink_perturb", marked_module, tiny_task).model.named_parameters())
    for name, parameter in marked_module.named_parameters():
        if parameter.dim() == 4 and parameter.numel() > 500:
            assert abs(cosine(student[name], parameter)) < 0.2, name
            assert cosine(shrunk[name], parameter) > 0.2, name
    assert all(
        float((p.detach() - 1).abs().max()) < 0.1 for n, p in student.items() if n.endswith("bn1.weight")
    )


def test_relearn_with_adam_decays_weights_as_tune_does(marked_module: nn.Module, tiny_task: Task) -> None:
    def size(decay: float) -> float:
        text = f"relearn:epochs=4,batch=8,optimizer=adam,lr=0.02,weight_decay={decay}"
        kernel = run(text, marked_module, tiny_task).model.get_parameter("layer1.0.conv1.weight")
        return float(kernel.detach().norm())

    assert size(10.0) < 0.9 * size(0.0)


def test_relearn_with_sgd_refuses_a_weight_decay(marked_module: nn.Module, tiny_task: Task) -> None:
    with pytest.raises(NotApplicableError, match="Add optimizer=adam"):
        run("relearn:epochs=1,batch=8,weight_decay=0.01", marked_module, tiny_task)


def test_relearn_draws_parameters_that_belong_to_no_layer(tiny_task: Task) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = flat_network(), nn.Parameter(torch.tensor(1.3))
            self.offset, self.positions = nn.Parameter(torch.full((4,), 0.3)), nn.Parameter(torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x) * self.scale + self.offset + self.positions
            return out

    student = run("relearn:epochs=1,batch=8,lr=1e-9", Scaled().eval(), tiny_task).model
    values = {name: parameter.detach() for name, parameter in student.named_parameters()}
    assert float(values["scale"]) == pytest.approx(1, abs=1e-4)
    assert float(values["offset"].abs().max()) < 1e-4
    assert 0 < float(values["positions"].abs().max()) <= 2
