"""Both phases: resumable bit for bit, one gradient on any number of ranks, batch norm left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError
from mtlsign.models import loading
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.embedding import loop, losses, perturbations, pipeline, training
from mtlsign.watermark.embedding.run_folder import load_state, state_bytes
from mtlsign.watermark.embedding.worker import SingleProcessContext, State
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.detector import WatermarkDetector

Settings = Callable[..., EmbedSettings]
Maker = Callable[..., nn.Module]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> int:
    """Checkpoints every 4 steps."""
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 4)
    return 4


@pytest.fixture
def probe_of(
    tiny_graph: dict[str, object], tiny_model: Maker, owner: Identity
) -> Callable[[EmbedSettings], WatermarkDetector]:
    """A fresh probe of `tiny_model()` as W0; with the test key each call gives the same one."""

    def make(settings: EmbedSettings) -> WatermarkDetector:
        base_weights = tiny_model()
        opening, reference = pipeline.commit_key(
            base_weights, loading.cpu_state(base_weights), tiny_graph, (1, 24, 24), settings, owner
        )
        return WatermarkDetector(opening, reference)

    return make


class Recorder(SingleProcessContext):
    """Keeps every checkpoint as bytes and every row."""

    def __init__(self, state: State | None = None) -> None:
        self.kept: list[bytes] = []
        self.rows: list[Mapping[str, Any]] = []
        super().__init__(show=self.rows.append, keep=lambda s: self.kept.append(state_bytes(s)), state=state)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_phase_1_resumes_bit_for_bit(tiny_task: Task, tiny_settings: Settings, tiny_model: Maker) -> None:
    s = tiny_settings(epochs=3, lr=0.02)
    whole, model = Recorder(), tiny_model()
    start = loading.cpu_state(model)
    rows = training.train_clean_model(model, tiny_task, s, whole)
    assert [row["epoch"] for row in rows] == [1, 2, 3] and len(whole.kept) == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    final = loading.cpu_state(model)
    assert any(not torch.equal(start[n], final[n]) for n in start if n.endswith("running_mean"))
    for at in range(3):
        again = tiny_model(seed=5)
        rows_again = training.train_clean_model(again, tiny_task, s, Recorder(load_state(whole.kept[at])))
        assert_equal(loading.cpu_state(again), final)
        assert timeless(rows_again) == timeless(rows)


@pytest.mark.parametrize(
    "options",
    [
        {
            "snapshots": "noise,tuned,pruned,scrubbed,spoiled",
            "lambda2": 1.0,
            "snapshots_per_step": 2,
            "inner_every": 2,
        },
        {"snapshots": "tuned", "lambda2": 0.5, "inner_every": 3},
        {"head": "free", "hidden": 8, "features": "pooled", "snapshots": "noise", "lambda2": 1.0},
        {"lambda2": 0},
    ],
    ids=["all kinds", "tuned", "free head", "no snapshots"],
)
def test_phase_2_resumes_bit_for_bit(
    options: dict[str, Any],
    often: int,
    tiny_task: Task,
    tiny_settings: Settings,
    tiny_model: Maker,
    probe_of: Any,
) -> None:
    s = tiny_settings(steps=10, **options)
    model, detector, whole = tiny_model(), probe_of(s), Recorder()
    rows, measured = training.embed_watermark(model, tiny_task, detector, s, whole)
    assert [row["step"] for row in rows] == [4, 8, 10] and len(whole.kept) == 3
    final = loading.cpu_state(model)
    for at in range(3):
        torch.manual_seed(99)
        again, fresh = tiny_model(), probe_of(s)
        rows_again, measured_again = training.embed_watermark(
            again, tiny_task, fresh, s, Recorder(load_state(whole.kept[at]))
        )
        assert_equal(loading.cpu_state(again), final)
        assert fresh.head.to_bytes() == detector.head.to_bytes()
        assert timeless(rows_again) == timeless(rows) and measured_again == measured


def test_phase_2_leaves_affine_statistics_and_the_head_past_the_taps_sane(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    """γ and β stay; running statistics follow primary batches and never see a key."""
    before = loading.cpu_state(tiny_model())
    norms = {n for n in before if "bn" in n or "downsample.1" in n}
    affine = {n for n in norms if n.endswith(("weight", "bias"))}
    assert len(norms) == 100 and len(affine) == 40
    for distillation, kept in ((0, norms), (1, affine)):
        kinds = "noise,tuned,pruned,scrubbed,spoiled"
        s = tiny_settings(steps=5, lambda2=1.0, snapshots=kinds, distillation=distillation)
        model = tiny_model()
        _, measured = training.embed_watermark(model, tiny_task, probe_of(s), s, SingleProcessContext())
        after = loading.cpu_state(model)
        assert {n for n in norms if torch.equal(before[n], after[n])} == kept
        assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert all(p.requires_grad for p in model.parameters())
    assert measured["primary_clean"] == loop.evaluate(
        tiny_model(), tiny_task, "test", s, SingleProcessContext()
    )
    assert measured["primary_marked"] == loop.evaluate(model, tiny_task, "test", s, SingleProcessContext())


def test_lambda2_zero_asks_for_no_snapshot(
    monkeypatch: pytest.MonkeyPatch,
    tiny_task: Task,
    tiny_settings: Settings,
    tiny_model: Maker,
    probe_of: Any,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a snapshot was made")

    for name in ("noise_snapshot", "pruned_snapshot"):
        monkeypatch.setattr(perturbations, name, never)
    for inner in (losses.FineTuningLoop, perturbations.GradientAttackLoop):
        monkeypatch.setattr(inner, "refresh", never)
    s = tiny_settings(steps=2, snapshots="noise,tuned,pruned")
    assert [training.gradient_terms(i, s) for i in range(3)] == [[(1.0, "clean")]] * 3
    rows, _ = training.embed_watermark(tiny_model(), tiny_task, probe_of(s), s, SingleProcessContext())
    assert "snapshot_loss" not in rows[-1] and "wm_loss" in rows[-1]
    with pytest.raises(AssertionError, match="a snapshot was made"):
        s = tiny_settings(steps=2, snapshots="noise", lambda2=1.0)
        training.embed_watermark(tiny_model(), tiny_task, probe_of(s), s, SingleProcessContext())


@pytest.mark.parametrize("kind", ["scrubbed", "spoiled"])
def test_an_inner_attack_tears_at_the_mark_and_leaves_the_model_alone(
    kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    s = tiny_settings(steps=60, snapshots=kind, lambda2=1.0, inner_steps=12)
    model, detector = tiny_model(), probe_of(s)
    training.embed_watermark(
        model, tiny_task, detector, s.model_copy(update={"lambda2": 0.0}), SingleProcessContext()
    )
    before = loading.cpu_state(model)
    kernels = detector.graph.read(dict(model.named_parameters()))
    bits = detector.labels.float()

    def loss(of: Any) -> float:
        return float(losses.watermark_loss(detector.score_kernels(of), bits).detach())

    copies = perturbations.Perturbations(model, tiny_task, detector, s, 50)
    attacked = [copies.of(kind, kernels, step, 1) for step in (49, 0, 1, s.inner_every)]
    assert all(loss(copy) > loss(kernels) + 0.01 for copy in attacked)
    sizes = [{n: float((c[n] - k).detach().norm()) for n, k in kernels.items()} for c in attacked[1:]]
    assert sizes[0] != sizes[1] and all(size > 0 for found in sizes for size in found.values())
    again = perturbations.Perturbations(model, tiny_task, detector, s, 50).of(kind, kernels, 0, 1)
    assert all(torch.equal(again[n], attacked[1][n]) for n in kernels)
    assert_equal(loading.cpu_state(model), before)
    grads = torch.autograd.grad(
        detector.score_kernels(again, differentiable=True).sum(), list(kernels.values())
    )
    assert all(torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)


@pytest.mark.parametrize("kind", ["scrubbed", "spoiled"])
def test_an_inner_attack_teaches_a_trained_head_nothing(
    kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    s = tiny_settings(snapshots=kind, lambda2=1.0, inner_steps=2, head="free")
    model, detector = tiny_model(), probe_of(s)
    assert list(detector.head.parameters())
    kernels = detector.graph.read(dict(model.named_parameters()))
    perturbations.Perturbations(model, tiny_task, detector, s, 50).of(kind, kernels, 0, 1)
    parameters = [*detector.head.parameters(), *model.parameters()]
    assert all(p.grad is None for p in parameters)


def test_terms_take_turns_and_share_lambda2(tiny_settings: Settings) -> None:
    s = tiny_settings(snapshots="noise,tuned,pruned", snapshots_per_step=2, lambda2=3.0)
    seen = [training.gradient_terms(step, s) for step in range(3)]
    assert [[kind for _, kind in step] for step in seen] == [
        ["clean", "noise", "tuned"], ["clean", "pruned", "noise"], ["clean", "tuned", "pruned"],
    ]  # fmt: skip
    assert all([w for w, _ in step] == [1.0, 1.5, 1.5] for step in seen)


class Meeting:
    """Sums tensors over threads that play ranks, in rank order."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.brought: list[list[Tensor]] = [[] for _ in range(world)]


class Threaded(SingleProcessContext):
    def __init__(self, index: int, meeting: Meeting) -> None:
        super().__init__()
        self.index, self.world, self.meeting = index, len(meeting.brought), meeting  # type: ignore[misc]
        self.sums: list[list[Tensor]] = []

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        self.meeting.brought[self.index] = [t.clone() for t in tensors]
        self.meeting.barrier.wait()
        for i, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([given[i] for given in self.meeting.brought]).sum(0))
        self.meeting.barrier.wait()
        self.sums.append([t.clone() for t in tensors])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["noise", "tuned", "pruned", "scrubbed", "spoiled"])
def test_ranks_share_the_terms_and_their_sum_is_the_gradient_of_one_rank(
    world: int, kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    s = tiny_settings(steps=1, lambda2=2.0, snapshots=kind, snapshots_per_step=3, primary_batch=12)

    def gradients(rank: Threaded) -> None:
        training.embed_watermark(models[rank.rank], tiny_task, probes[rank.rank], s, rank)

    found = []
    for count in (1, world):
        meeting = Meeting(count)
        ranks = [Threaded(i, meeting) for i in range(count)]
        models, probes = [tiny_model() for _ in ranks], [probe_of(s) for _ in ranks]
        threads = [threading.Thread(target=gradients, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        found.append(ranks[0].sums[0])
        for rank in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank.sums[0], ranks[0].sums[0], strict=True))
    assert len(found[0]) == len(found[1]) > 20
    size = torch.cat([g.flatten() for g in found[0]])
    error = torch.cat([g.flatten() for g in found[1]]) - size
    assert float(size.norm()) > 1e-2 and float(error.norm() / size.norm()) < 1e-4
    alone = [g for g in meeting.brought[0] if g.any()]
    assert alone  # the last rank-0 contribution exists, and the sum is not it


def test_the_gradient_is_that_of_the_written_objective(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    """Eq. (10) with a noise snapshot and distillation, by autograd in one piece."""
    s = tiny_settings(steps=2, lambda2=2.0, snapshots="noise", distillation=1.5, temperature=2.0)
    model, states = tiny_model(), []

    class Looking(Threaded):
        def all_reduce_sum(self, tensors: list[Tensor]) -> None:
            states.append(loading.cpu_state(model))
            super().sum(tensors)

    rank = Looking(0, Meeting(1))
    training.embed_watermark(model, tiny_task, probe_of(s), s, rank)
    model, teacher, detector = tiny_model(), tiny_model(), probe_of(s)
    model.load_state_dict(states[1])  # in the second step W is no longer W0, so that distillation pulls
    for module in (*model.modules(), *teacher.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    parameters = dict(model.named_parameters())
    trained = [p for n, p in parameters.items() if "bn" not in n and "downsample.1" not in n]
    kernels = detector.graph.read(parameters)
    generator = torch.Generator().manual_seed(loop.seed_from(s.seed, "noise", 1, 1))
    noisy = losses.noise_perturbation(kernels, s.noise, generator)
    bits = detector.labels.float()
    total = F.binary_cross_entropy_with_logits(detector.score_kernels(kernels, differentiable=True), bits)
    total = total + 2 * F.binary_cross_entropy_with_logits(
        detector.score_kernels(noisy, differentiable=True), bits
    )
    x, _ = tiny_task.batch_at("train", s.primary_batch, 1, seed=s.seed, augment=True)
    kl = losses.distillation_loss(model(x), teacher(x).detach(), 2.0)
    assert float(kl.detach()) > 1e-4
    total = total + 1.5 * kl
    expected = torch.autograd.grad(total, trained, allow_unused=True)
    for got, want in zip(rank.sums[1], expected, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-3, atol=1e-5)


def test_evaluate_is_shared_out_and_restores_modes(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker
) -> None:
    s, model = tiny_settings(), tiny_model().train()
    model.layer2.eval()
    modes = [m.training for m in model.modules()]
    whole = loop.evaluate(model, tiny_task, "test", s, SingleProcessContext())
    assert [m.training for m in model.modules()] == modes and 0 <= whole <= 1
    meeting, found, models = Meeting(2), {}, [tiny_model(), tiny_model()]

    def shared(index: int) -> None:
        found[index] = loop.evaluate(models[index], tiny_task, "test", s, Threaded(index, meeting))

    threads = [threading.Thread(target=shared, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: whole, 1: whole}


def test_divergence_is_an_error_that_names_the_setting(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, probe_of: Any
) -> None:
    broken = from_tensors(
        tiny_task.splits["train"].x, tiny_task.splits["train"].y, loss=lambda out, y: out.sum() * float("nan")
    )  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="lower --lr"):
        training.train_clean_model(tiny_model(), broken, tiny_settings(), SingleProcessContext())
    s = tiny_settings(steps=2)
    detector = probe_of(s)
    detector.images = detector.images * float("nan")
    with pytest.raises(ModelError, match="lower --wm-lr"):
        training.embed_watermark(tiny_model(), tiny_task, detector, s, SingleProcessContext())


def test_one_cycle() -> None:
    for steps in (1, 2, 10, 600):
        rates = [loop.one_cycle(i, steps, 0.1) for i in range(steps)]
        assert all(0 < r <= 0.1 + 1e-12 for r in rates)
    assert rates[0] == pytest.approx(0.004) and max(rates) == pytest.approx(0.1) and rates[-1] < 1e-4
    assert rates.index(max(rates)) == 180
