"""The attack suite: every attack runs, costs what it says, and leaves the stolen model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.attacks import (
    ATTACKS,
    AttackDivergedError,
    AttackerResources,
    AttackOutcome,
    NotApplicableError,
    parse_attacks,
)
from mtlsign.attacks.attacker_data import attacker_view, transform_inputs, transform_task
from mtlsign.attacks.quantisation import quantise
from mtlsign.attacks.symmetries import TOLERANCE, function_change
from mtlsign.models import architectures
from mtlsign.tasks import Task
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.detector import WatermarkDetector, verify

Maker = Callable[..., nn.Module]

#: Settings under which an attack takes well under a second on the tiny network.
QUICK = {
    "overwrite": "epochs=3,n=128,images=16", "spoil": "steps=3,batch=16",
    "scrub": "steps=2,codes=32,batch=16",
    "fresh_early": "steps=3,batch=16", "forge_head": "steps=5,hidden=4", "average": "copies=1",
    "prune_until": "points=50",
}  # fmt: skip
TRAINED = ("ftll", "ftal", "rtll", "rtal", "annealed", "fine_prune", "fine_prune_channels")
FREE = [name for name, attack in ATTACKS.items() if attack.kind == "free"]


def run(text: str, model: nn.Module, task: Task, seed: int = 0, **means: Any) -> AttackOutcome:
    (order,) = parse_attacks(text)
    return order.run(model, task, AttackerResources(**{"lr": 0.02, **means}), seed)


@pytest.fixture
def detector(marked: Any) -> WatermarkDetector:
    return detector_for_kit(marked[1].kit)


@pytest.fixture
def stolen(marked: Any, tiny_model: Maker) -> nn.Module:
    model = tiny_model()
    model.load_state_dict(marked[1].tensors)
    return model.eval()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_runs_repeats_and_leaves_the_stolen_model_alone(
    name: str, stolen: nn.Module, tiny_task: Task, detector: WatermarkDetector
) -> None:
    settings = QUICK.get(name, "epochs=1,batch=16" if name in TRAINED else "")
    text = f"{name}:{settings}" if settings else name
    before = copy.deepcopy(stolen.state_dict())
    copies = [{n: t + 0.01 if t.is_floating_point() else t for n, t in before.items()}]
    noise = torch.random.get_rng_state()
    first = run(text, stolen, tiny_task, seed=3, detector=detector, copies=copies)
    assert torch.equal(noise, torch.random.get_rng_state()), "the caller's generator moved"
    assert all(torch.equal(t, before[n]) for n, t in stolen.state_dict().items())
    again = run(text, stolen, tiny_task, seed=3, detector=detector, copies=copies)
    same = first.model.state_dict()
    assert all(torch.equal(t, same[n]) for n, t in again.model.state_dict().items())
    assert not first.model.training and (first.steps, first.images) == (again.steps, again.images)
    changed = any(n not in same or not torch.equal(t, same[n]) for n, t in before.items())
    assert changed != (name in ("none", "forge_head"))
    trains = name in (*TRAINED, "overwrite", "spoil", "scrub", "fresh_early", "forge_head")
    assert (first.steps > 0) == trains == (first.images > 0)
    verdict = verify(same, detector)
    assert verdict.status != "not_verifiable" and all(torch.isfinite(t).all() for t in same.values())


@pytest.mark.parametrize("name", FREE)
def test_symmetries_preserve_the_function(name: str, tiny_model: Maker, tiny_task: Task) -> None:
    """On random batch norms, some γ negative: outputs move by no more than 1e-5 of the largest."""
    model = tiny_model(1)
    done = run(name, model, tiny_task, 1)
    x = torch.rand(16, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    assert function_change(model, done.model, x, done.inputs) < TOLERANCE  # in float64
    with torch.no_grad():
        want, got = model(x), done.model(transform_inputs(x, done.inputs))  # in float32
    assert float((want - got).abs().max() / want.abs().max()) < TOLERANCE
    # what needs changed inputs is another function without them
    assert (function_change(model, done.model, x) > 1e-3) == bool(done.inputs)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("text", ["scale_stream+permute_channels+scale_inner+scale_rows+bn_gauge+bn_fold"])
def test_symmetries_in_sequence_on_both_kinds_of_block(arch: str, text: str, tiny_task: Task) -> None:
    torch.manual_seed(0)
    model = architectures.build(architectures.architecture_for(arch, channels=1, classes=4, width=8)).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                m.weight.uniform_(0.5, 1.5)
    done = run(text, model, tiny_task)
    names = set(done.model.state_dict())
    assert "conv1.bias" in names and not any("running" in n or ".bn" in n for n in names)
    x = torch.rand(4, 1, 24, 24)
    assert function_change(model, done.model, x) < 2 * TOLERANCE


def test_symmetries_that_the_verifier_undoes_and_those_it_does_not(
    stolen: nn.Module, tiny_task: Task, detector: WatermarkDetector
) -> None:
    def bits(text: str) -> float:
        return verify(run(text, stolen, tiny_task).model.state_dict(), detector).accuracy

    whole = bits("none")
    assert whole > 0.95
    for text in ("bn_gauge", "bn_fold", "scale_rows", "scale_inner", "scale_stream", "scale_inner+bn_fold"):
        assert bits(text) >= whole - 0.02, text
    assert bits("permute_channels:which=inner") < whole  # stem and first stage: inner channels feed the taps
    for text in ("permute_channels:which=stream", "transpose_input", "negate_input"):
        assert bits(text) < 0.75, text


def test_symmetries_refuse_other_architectures(tiny_task: Task) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 4)).eval()
    with pytest.raises(NotApplicableError, match="channel sets of Sequential"):
        run("permute_channels", plain, tiny_task)
    with pytest.raises(NotApplicableError, match="no symmetry"):  # the flattened map is transposed too
        run("transpose_input", plain, tiny_task)
    assert run("negate_input", plain, tiny_task).inputs == ("negated",)
    with pytest.raises(NotApplicableError, match="stages of Sequential"):
        run("scrub:steps=1", plain, tiny_task)


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm has them."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def test_other_networks(tiny_task: Task) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3), NormAct(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for m in (model[1], model[3]):
            m.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            m.weight.uniform_(-1, 1)
    for text in ("bn_fold", "bn_gauge", "scale_rows", "transpose_input", "negate_input"):
        done = run(text, model, tiny_task)
        assert function_change(model, done.model, torch.rand(4, 1, 24, 24), done.inputs) < TOLERANCE, text
    assert "1.weight" not in run("bn_fold", model, tiny_task).model.state_dict()
    left = run("bn_fold:decoys=signs", model, tiny_task).model.state_dict()
    assert "3.weight" in left and "3.running_var" not in left
    assert (run("prune_channels:ratio=0.4", model, tiny_task).model[1].weight == 0).sum() == 2  # type: ignore[index]
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 4)).eval()
    for text in ("bn_fold", "bn_gauge", "scale_rows"):
        with pytest.raises(NotApplicableError, match="has no batch norm"):
            run(text, plain, tiny_task)


def test_attackers_see_their_part_alone(tiny_task: Task, tiny_model: Maker) -> None:
    model = tiny_model()
    mine = attacker_view(model, tiny_task, AttackerResources(), 0)
    original = tiny_task.splits["attacker"].batch(torch.arange(tiny_task.size("attacker")))[0]
    for split in ("train", "inner", "attacker", "test", "validation"):
        x = mine.splits[split].batch(torch.arange(mine.size(split)))[0]
        assert torch.equal(x, original[: len(x)]), split
    more = attacker_view(model, tiny_task, AttackerResources(extra=0.5), 0)
    extra = round(0.5 * tiny_task.size("train"))
    assert more.size("attacker") == tiny_task.size("attacker") + extra
    order = torch.randperm(more.size("attacker"), generator=torch.Generator().manual_seed(0))
    x, y = more.splits["attacker"].batch(order)
    for place, index in enumerate(order[:20].tolist()):
        one, label = more.splits["attacker"].batch(torch.tensor([index]))
        assert torch.equal(x[place], one[0]) and y[place] == label[0]
    train = tiny_task.splits["train"].batch(torch.arange(tiny_task.size("train")))[0].flatten(1)
    beyond = more.splits["attacker"].batch(torch.arange(more.size("attacker")))[0][len(original) :].flatten(1)
    assert all(any(torch.equal(x, own) for own in train) for x in beyond)
    assert len(torch.unique(beyond, dim=0)) == extra


def test_later_links_see_images_as_earlier_ones_left_them(stolen: nn.Module, tiny_task: Task) -> None:
    done = run("transpose_input+negate_input+ftal:epochs=1,batch=16,lr=0.0001", stolen, tiny_task)
    assert done.inputs == ("transposed", "negated") and done.steps > 0
    from mtlsign.attacks.pruning import accuracy

    before = accuracy(stolen, attacker_view(stolen, tiny_task, AttackerResources(), 0))
    seen = attacker_view(done.model, transform_task(tiny_task, done.inputs), AttackerResources(), 0)
    assert accuracy(done.model, seen) >= before - 0.1


def test_pruning_takes_what_it_says_and_fine_pruning_keeps_the_holes(
    stolen: nn.Module, tiny_task: Task
) -> None:
    def zeros(model: nn.Module) -> list[float]:
        return [float((p == 0).float().mean()) for p in model.parameters() if p.dim() > 1]

    assert all(abs(z - 0.5) < 0.02 for z in zeros(run("prune:ratio=0.5", stolen, tiny_task).model))
    tuned = run("fine_prune:ratio=0.5,epochs=1,batch=16", stolen, tiny_task).model
    assert all(abs(z - 0.5) < 0.02 for z in zeros(tuned))
    largest = stolen.conv1.weight.abs().max()  # type: ignore[union-attr, operator]
    kept = run("prune:ratio=0.9", stolen, tiny_task).model.conv1.weight  # type: ignore[union-attr]
    assert kept.abs().max() == largest  # type: ignore[operator]
    rows = run("prune_channels:ratio=0.25,by=norm", stolen, tiny_task).model
    dead = rows.layer1[0].conv1.weight.flatten(1).norm(dim=1) == 0  # type: ignore[index, union-attr, operator]
    assert int(dead.sum()) == 2 and (rows.layer1[0].bn1.weight[dead] == 0).all()  # type: ignore[index, union-attr]


def test_prune_until_stops_before_the_price(stolen: nn.Module, tiny_task: Task) -> None:
    from mtlsign.attacks.pruning import accuracy

    data = attacker_view(stolen, tiny_task, AttackerResources(), 0)
    free = run("prune_until:points=0", stolen, tiny_task).model
    assert accuracy(free, data) >= accuracy(stolen, data)
    dear = run("prune_until:points=100", stolen, tiny_task).model
    assert sum((p == 0).sum() for p in dear.parameters()) > sum((p == 0).sum() for p in free.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_rows_have_few_levels_near_the_weights(bits: int) -> None:
    w = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    q = quantise(w, bits)
    assert (q[2] == 0).all()
    for row, given in zip(q, w, strict=True):
        step = given.abs().max() / (2 ** (bits - 1) - 1)
        assert len(torch.unique(row)) < 2**bits and (row - given).abs().max() <= 0.5001 * step


def test_forging_a_free_head_needs_no_weight_and_counts_for_nothing(
    stolen: nn.Module, tiny_task: Task
) -> None:
    done = run("forge_head:steps=60,hidden=16", stolen, tiny_task)
    assert done.verdict is not None and done.verdict.accuracy > 0.9
    assert done.verdict.status == "needs_commitment" and not done.verdict.accepted
    assert all(torch.equal(t, done.model.state_dict()[n]) for n, t in stolen.state_dict().items())


def test_knowing_the_key_spoils_it(stolen: nn.Module, tiny_task: Task, detector: WatermarkDetector) -> None:
    before = verify(stolen.state_dict(), detector).accuracy
    done = run("spoil:steps=40,batch=16,lr=0.003", stolen, tiny_task, detector=detector)
    assert verify(done.model.state_dict(), detector).accuracy < before - 0.2
    with pytest.raises(NotApplicableError, match="opened key"):
        run("spoil", stolen, tiny_task)


def test_averaging_needs_copies_that_fit(stolen: nn.Module, tiny_task: Task) -> None:
    state: dict[str, Tensor] = stolen.state_dict()
    other = {n: 3 * t if t.is_floating_point() else t for n, t in state.items()}
    done = run("average:bn=kept", stolen, tiny_task, copies=[other])
    assert torch.allclose(done.model.state_dict()["conv1.weight"], 2 * state["conv1.weight"])
    for copies, text in (([], "average"), ([other], "average:copies=2"), ([{"x": torch.ones(1)}], "average")):
        with pytest.raises(NotApplicableError):
            run(text, stolen, tiny_task, copies=copies)


@pytest.mark.parametrize("text", ["ftal:lr=100,epochs=5,batch=16", "spoil:steps=20,lr=100,batch=16"])
def test_divergence_is_told(
    text: str, stolen: nn.Module, tiny_task: Task, detector: WatermarkDetector
) -> None:
    with torch.no_grad():
        stolen.fc.bias[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(AttackDivergedError, match="not finite"):
        run(text, stolen, tiny_task, detector=detector)


def test_a_free_head_is_attacked_like_a_keyed_one(
    tiny_task: Task, tiny_graph: dict[str, object], tiny_model: Maker, owner: Any
) -> None:
    import mtlsign

    model = tiny_model()
    done = mtlsign.embed(
        model, tiny_task, trained=True, identity=owner, graph=tiny_graph, head="free", hidden=8, key_size=128,
        features="pooled", steps=15, lambda2=0, epochs=1, primary_batch=16, wm_lr=0.02,
        insecure_test_key=True,
    )  # fmt: skip
    detector = detector_for_kit(done.kit)
    head = detector.head.to_bytes()
    before = verify(model.state_dict(), detector).accuracy
    spoiled = run("spoil:steps=15,batch=16,lr=0.003", model, tiny_task, detector=detector)
    assert verify(spoiled.model.state_dict(), detector).accuracy < before - 0.1
    assert detector.head.to_bytes() == head, "the thief trained the owner's head"
    run("scrub:steps=2,codes=32,batch=16,stages=3", model, tiny_task)
