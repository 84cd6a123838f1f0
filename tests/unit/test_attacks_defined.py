"""What the attacks are: each test fails if its attack is weaker than its definition says, or another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mtlsign.attacks import AttackerResources, AttackOutcome, adversary_key, decorrelation, parse_attacks
from mtlsign.attacks.attacker_data import attacker_view
from mtlsign.tasks import Batch, Split, Task
from mtlsign.watermark.embedding.losses import correlation_loss
from mtlsign.watermark.verification.detector import verify

Maker = Callable[..., nn.Module]
RATE = 0.02


def run(text: str, model: nn.Module, task: Task, seed: int = 0, **means: Any) -> AttackOutcome:
    (order,) = parse_attacks(text)
    return order.run(model, task, AttackerResources(**{"lr": RATE, **means}), seed)


@pytest.fixture
def stolen(tiny_model: Maker) -> nn.Module:
    return tiny_model()


def mine(model: nn.Module, task: Task) -> Tensor:
    """All images of the attacker."""
    (x, _), *more = attacker_view(model, task, AttackerResources(), 0).batches("attacker", 256, shuffle=False)
    assert not more
    return x


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    given = dict(model.named_parameters())
    return {name for name, p in other.named_parameters() if not torch.equal(p, given[name])}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


# -- fine-tuning --------------------------------


def test_last_layer_attacks_train_the_last_layer_alone(stolen: nn.Module, tiny_task: Task) -> None:
    last, every = {"fc.weight", "fc.bias"}, {name for name, _ in stolen.named_parameters()}
    for name, wanted in (("ftll", last), ("rtll", last), ("ftal", every), ("rtal", every)):
        assert changed(stolen, run(f"{name}:epochs=1", stolen, tiny_task).model) == wanted, name


@dataclass(frozen=True)
class Relabelled:
    """The same images, each of another class."""

    split: Split

    def __len__(self) -> int:
        return len(self.split)

    def to(self, device: torch.device | str) -> Relabelled:
        return Relabelled(self.split.to(device))

    def batch(self, indices: Tensor, augment: Generator | None = None, share: slice | None = None) -> Batch:
        x, y = self.split.batch(indices, augment, share)
        return x, (y + 1) % 4


@pytest.mark.parametrize(
    ("name", "looks"), [("ftll", True), ("ftal", True), ("rtll", False), ("rtal", False), ("annealed", True)]
)
def test_only_retraining_does_without_true_labels(
    name: str, looks: bool, stolen: nn.Module, tiny_task: Task
) -> None:
    wrong = replace(tiny_task, splits={n: Relabelled(s) for n, s in tiny_task.splits.items()})
    first, second = (run(f"{name}:epochs=1", stolen, task).model for task in (tiny_task, wrong))
    assert bool(changed(first, second)) == looks


def test_retraining_draws_the_last_layer_anew(stolen: nn.Module, tiny_task: Task) -> None:
    def last(name: str, seed: int = 0) -> Tensor:
        done = run(f"{name}:epochs=1,lr=1e-6", stolen, tiny_task, seed)
        return done.model.fc.weight  # type: ignore[union-attr, return-value]

    given = last("ftll")
    for name in ("rtll", "rtal"):
        fresh = last(name)
        assert abs(cosine(fresh, given)) < 0.5 and abs(cosine(fresh, last(name, 1))) < 0.5, name
    assert cosine(last("ftal"), given) > 0.999


def test_annealing_starts_at_the_training_rate_and_ends_near_0(
    stolen: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    for text, first in (("annealed", RATE), ("ftal", RATE / 4), ("ftal:lr=tenth", RATE / 10)):
        rates.clear()
        done = run(text, stolen, tiny_task)
        assert len(rates) == done.steps and rates[0] == pytest.approx(first), text
        if text == "annealed":
            assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.05 * first
        else:
            assert set(rates) == {rates[0]}


# -- features torn away, layers drawn anew, noise --------------------------------


def test_scrubbing_tears_the_response_to_codes_away(stolen: nn.Module, tiny_task: Task) -> None:
    data = attacker_view(stolen, tiny_task, AttackerResources(), 0)
    graph, images = decorrelation._graph(stolen, data, 99, 1)  # codes that the attack never saw

    def likeness(model: nn.Module) -> float:
        def features(net: nn.Module) -> Tensor:
            read = graph.read({n: p.detach() for n, p in net.named_parameters()})
            return graph.features(graph.into_frame(read), images[:256]).standardised

        with torch.no_grad():
            return float(correlation_loss(features(stolen), features(model)))

    done = run("scrub:steps=8,lr=0.003,codes=64,batch=16", stolen, tiny_task)
    assert likeness(stolen) > 0.98 and likeness(done.model) < 0.7


@pytest.mark.parametrize(("stages", "parts"), [(1, ("conv1", "layer1")), (2, ("conv1", "layer1", "layer2"))])
def test_fresh_layers_are_fresh_and_the_rest_stays(
    stages: int, parts: tuple[str, ...], stolen: nn.Module, tiny_task: Task
) -> None:
    done = run(f"fresh_early:stages={stages},steps=1,lr=1e-6,batch=16", stolen, tiny_task)
    given = dict(stolen.named_parameters())
    for name, p in done.model.named_parameters():
        if not name.startswith((*parts, "bn1")):
            assert torch.equal(p, given[name]), name
        elif p.dim() > 1:
            assert abs(cosine(p, given[name])) < 0.4, name


def test_fresh_layers_learn_the_stolen_features(stolen: nn.Module, tiny_task: Task) -> None:
    x = mine(stolen, tiny_task)

    def error(steps: int) -> float:
        model = run(f"fresh_early:steps={steps},batch=16", stolen, tiny_task).model
        with torch.no_grad():
            found, wanted = (nn.Sequential(*list(m.children())[:5])(x) for m in (model, stolen))
        return float((found - wanted).square().mean() / wanted.var())

    assert error(20) < 0.7 * error(1)


@torch.no_grad()
def test_noise_is_as_loud_as_it_says(stolen: nn.Module, tiny_task: Task) -> None:
    for sigma in (0.2, 0.4):
        noisy = dict(run(f"noise:sigma={sigma}", stolen, tiny_task).model.named_parameters())
        for name, p in stolen.named_parameters():
            if p.dim() < 2:
                assert torch.equal(p, noisy[name]), name
            elif p.numel() > 500:
                assert float((noisy[name] - p).std() / p.std()) == pytest.approx(sigma, rel=0.15), name


# -- pruning --------------------------------


def dead(model: nn.Module, name: str) -> set[int]:
    return set(torch.nonzero(model.get_submodule(name).weight.flatten(1).norm(dim=1) == 0).flatten().tolist())  # type: ignore[union-attr, operator]


@torch.no_grad()
def test_channel_pruning_takes_the_least_active(stolen: nn.Module, tiny_task: Task) -> None:
    x, seen = mine(stolen, tiny_task), {}
    pairs = {"conv1": "bn1", "layer1.0.conv1": "layer1.0.bn1", "layer3.0.conv2": "layer3.0.bn2"}
    for conv, norm in pairs.items():
        hook = stolen.get_submodule(norm).register_forward_hook(
            lambda _, __, out, conv=conv: seen.update({conv: out.relu().mean((0, 2, 3))})
        )
        stolen(x)
        hook.remove()
    pruned = run("prune_channels:ratio=0.25", stolen, tiny_task).model
    for conv, activity in seen.items():
        assert dead(pruned, conv) == set(activity.argsort()[: len(activity) // 4].tolist()), conv
    by_norm = run("prune_channels:ratio=0.25,by=norm", stolen, tiny_task).model
    norms = stolen.layer1[0].conv1.weight.flatten(1).norm(dim=1)  # type: ignore[index, union-attr, operator]
    assert dead(by_norm, "layer1.0.conv1") == set(norms.argsort()[:2].tolist())


def test_fine_pruned_channels_stay_pruned_and_the_rest_is_tuned(stolen: nn.Module, tiny_task: Task) -> None:
    pruned = run("prune_channels:ratio=0.25", stolen, tiny_task).model
    tuned = run("fine_prune_channels:ratio=0.25,epochs=1", stolen, tiny_task).model
    for name in ("conv1", "layer1.0.conv1", "layer3.0.conv2"):
        assert dead(tuned, name) == dead(pruned, name) != set(), name
    assert "conv1.weight" in changed(pruned, tuned)


@pytest.mark.parametrize(
    "text", ["prune:ratio=0.3", "prune_channels:ratio=0.25", "prune_until:points=100", "noise", "average"]
)
def test_recalibrated_statistics_are_those_of_the_attackers_images(
    text: str, stolen: nn.Module, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtlsign.attacks.pruning.PATH", (0.1,))
    state = stolen.state_dict()
    copies = [{n: t * 1.1 if t.is_floating_point() else t for n, t in state.items()}]
    x, join = mine(stolen, tiny_task), "," if ":" in text else ":"
    model = run(f"{text}{join}bn=recalibrated", stolen, tiny_task, copies=copies).model
    with torch.no_grad():
        out = model.conv1(x)  # type: ignore[operator]
    found = model.bn1
    assert torch.allclose(found.running_mean, out.mean((0, 2, 3)), atol=1e-5)  # type: ignore[arg-type, union-attr]
    assert torch.allclose(found.running_var, out.var((0, 2, 3)), rtol=1e-3)  # type: ignore[arg-type, union-attr]
    if text != "average":
        kept = run(f"{text}{join}bn=kept", stolen, tiny_task).model.state_dict()
        assert all(torch.equal(kept[n], t) for n, t in state.items() if "running" in n)


# -- a second mark --------------------------------


def test_overwriting_embeds_a_second_key_in_as_many_steps_as_it_says(
    stolen: nn.Module, tiny_task: Task
) -> None:
    steps: list[int] = []

    def overwritten(epochs: int) -> nn.Module:
        text = f"overwrite:epochs={epochs},n=128,lambda2=0,images=16"
        return run(text, stolen, tiny_task, tick=lambda step, _: steps.append(step)).model

    s = adversary_key.adversary_settings(
        AttackerResources(lr=RATE), 0, stolen, head="keyed", lambda2=0.0, steps=30, key_size=128
    )
    detector = adversary_key.make_adversary_key(
        stolen, attacker_view(stolen, tiny_task, AttackerResources(), 0), s
    )[2]()
    found = [
        verify(model.state_dict(), detector).accuracy for model in (stolen, overwritten(1), overwritten(30))
    ]
    assert found[0] < 0.65 and found[1] < 0.75 and found[2] > 0.9
    assert max(steps) == 30
