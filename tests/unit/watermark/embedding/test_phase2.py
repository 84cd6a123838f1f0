"""Tests of phase 2: bit-exact resumption, one gradient on any number of ranks, unchanged batch norms."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError, SettingsError
from mtlsign.models import loading
from mtlsign.tasks import Task, from_tensors
from mtlsign.watermark.embedding import commitment, inner_loops, loop, losses, perturbations, phase1, phase2
from mtlsign.watermark.embedding.run_folder import load_state
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.verification.detector import WatermarkDetector
from tests.unit.watermark.embedding.phase_helpers import (
    Maker,
    ProgressRecorder,
    ReduceBarrier,
    Settings,
    ThreadWorker,
    assert_equal,
    without_seconds,
)


@pytest.mark.parametrize(
    "options",
    [
        {
            "perturbation.kinds": "noise,fine_tuned,pruned,decorrelated,spoiled",
            "lambda2": 1.0,
            "perturbation.per_step": 2,
            "perturbation.refresh_steps": 2,
        },
        {"perturbation.kinds": "fine_tuned", "lambda2": 0.5, "perturbation.refresh_steps": 3},
        {"head": "free", "hidden": 8, "features": "pooled", "perturbation.kinds": "noise", "lambda2": 1.0},
        {"lambda2": 0},
    ],
    ids=["all kinds", "fine_tuned", "free head", "no perturbations"],
)
def test_embed_watermark_resumes_bit_for_bit(
    options: dict[str, Any],
    frequent_checkpoints: int,
    tiny_task: Task,
    tiny_settings: Settings,
    tiny_model: Maker,
    detector_of: Any,
) -> None:
    s = tiny_settings(**options, **{"phase2.steps": 10})
    model, detector, recorder = tiny_model(), detector_of(s), ProgressRecorder()
    rows, measured = phase2.embed_watermark(model, tiny_task, detector, s, recorder)
    assert [row["step"] for row in rows] == [4, 8, 10] and len(recorder.checkpoints) == 3
    final = loading.cpu_state(model)
    for at in range(3):
        torch.manual_seed(99)
        again, fresh = tiny_model(), detector_of(s)
        rows_again, measured_again = phase2.embed_watermark(
            again, tiny_task, fresh, s, ProgressRecorder(load_state(recorder.checkpoints[at]))
        )
        assert_equal(loading.cpu_state(again), final)
        assert fresh.head_bytes() == detector.head_bytes()
        assert without_seconds(rows_again) == without_seconds(rows) and measured_again == measured


def test_embed_watermark_keeps_bn_affine_and_updates_statistics_from_primary_data(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    """γ and β are unchanged; running statistics follow primary batches, never key images."""
    before = loading.cpu_state(tiny_model())
    norms = {n for n in before if "bn" in n or "downsample.1" in n}
    affine = {n for n in norms if n.endswith(("weight", "bias"))}
    assert len(norms) == 100 and len(affine) == 40
    for distillation, kept in ((0, norms), (1, affine)):
        kinds = "noise,fine_tuned,pruned,decorrelated,spoiled"
        s = tiny_settings(
            lambda2=1.0,
            **{"phase2.steps": 5, "perturbation.kinds": kinds, "phase2.distillation": distillation},
        )
        model = tiny_model()
        _, measured = phase2.embed_watermark(model, tiny_task, detector_of(s), s, SingleProcessContext())
        after = loading.cpu_state(model)
        assert {n for n in norms if torch.equal(before[n], after[n])} == kept
        assert not torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert all(p.requires_grad for p in model.parameters())
    assert measured["primary_clean"] == loop.evaluate(
        tiny_model(), tiny_task, "test", s, SingleProcessContext()
    )
    assert measured["primary_marked"] == loop.evaluate(model, tiny_task, "test", s, SingleProcessContext())


def test_embed_watermark_with_lambda2_zero_makes_no_perturbations(
    monkeypatch: pytest.MonkeyPatch,
    tiny_task: Task,
    tiny_settings: Settings,
    tiny_model: Maker,
    detector_of: Any,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a perturbation was made")

    for name in ("noise_perturbation", "pruning_perturbation"):
        monkeypatch.setattr(perturbations, name, never)
    for inner in (inner_loops.FineTuningLoop, inner_loops.GradientAttackLoop):
        monkeypatch.setattr(inner, "refresh", never)
    s = tiny_settings(**{"phase2.steps": 2, "perturbation.kinds": "noise,fine_tuned,pruned"})
    assert [phase2.gradient_terms(i, s) for i in range(3)] == [[(1.0, "clean")]] * 3
    rows, _ = phase2.embed_watermark(tiny_model(), tiny_task, detector_of(s), s, SingleProcessContext())
    assert "snapshot_loss" not in rows[-1] and "wm_loss" in rows[-1]
    with pytest.raises(AssertionError, match="a perturbation was made"):
        s = tiny_settings(lambda2=1.0, **{"phase2.steps": 2, "perturbation.kinds": "noise"})
        phase2.embed_watermark(tiny_model(), tiny_task, detector_of(s), s, SingleProcessContext())


def test_gradient_terms_alternate_kinds_and_share_lambda2(tiny_settings: Settings) -> None:
    s = tiny_settings(
        lambda2=3.0, **{"perturbation.kinds": "noise,fine_tuned,pruned", "perturbation.per_step": 2}
    )
    seen = [phase2.gradient_terms(step, s) for step in range(3)]
    assert [[kind for _, kind in step] for step in seen] == [
        ["clean", "noise", "fine_tuned"], ["clean", "pruned", "noise"], ["clean", "fine_tuned", "pruned"],
    ]  # fmt: skip
    assert all([w for w, _ in step] == [1.0, 1.5, 1.5] for step in seen)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["noise", "fine_tuned", "pruned", "decorrelated", "spoiled"])
def test_embed_watermark_gradient_does_not_depend_on_rank_count(
    world: int, kind: str, tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    s = tiny_settings(
        lambda2=2.0,
        **{"phase2.steps": 1, "perturbation.kinds": kind, "perturbation.per_step": 3, "phase2.batch": 12},
    )

    def gradients(rank: ThreadWorker) -> None:
        phase2.embed_watermark(models[rank.rank], tiny_task, probes[rank.rank], s, rank)

    found = []
    for count in (1, world):
        meeting = ReduceBarrier(count)
        ranks = [ThreadWorker(i, meeting) for i in range(count)]
        models, probes = [tiny_model() for _ in ranks], [detector_of(s) for _ in ranks]
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
    alone = [g for g in meeting.contributions[0] if g.any()]
    assert alone  # the last rank-0 contribution exists, and the sum is not it


def test_embed_watermark_gradient_equals_autograd_of_objective(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    """Compare with eq. (10) with noise and distillation, differentiated by autograd as one expression."""
    s = tiny_settings(
        lambda2=2.0,
        **{
            "phase2.steps": 2,
            "perturbation.kinds": "noise",
            "phase2.distillation": 1.5,
            "phase2.temperature": 2.0,
        },
    )
    model, states = tiny_model(), []

    class StateRecorder(ThreadWorker):
        def all_reduce_sum(self, tensors: list[Tensor]) -> None:
            states.append(loading.cpu_state(model))
            super().all_reduce_sum(tensors)

    rank = StateRecorder(0, ReduceBarrier(1))
    phase2.embed_watermark(model, tiny_task, detector_of(s), s, rank)
    model, teacher, detector = tiny_model(), tiny_model(), detector_of(s)
    model.load_state_dict(states[1])  # in the second step W is no longer W0, so that distillation pulls
    for module in (*model.modules(), *teacher.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    parameters = dict(model.named_parameters())
    trained = [p for n, p in parameters.items() if "bn" not in n and "downsample.1" not in n]
    kernels = detector.select_weights(parameters)
    generator = torch.Generator().manual_seed(loop.seed_from(s.seed, "noise", 1, 1))
    noisy = losses.noise_perturbation(kernels, s.perturbation.noise_sigma, generator)
    bits = detector.labels.float()
    total = F.binary_cross_entropy_with_logits(detector.score_kernels(kernels, differentiable=True), bits)
    total = total + 2 * F.binary_cross_entropy_with_logits(
        detector.score_kernels(noisy, differentiable=True), bits
    )
    x, _ = tiny_task.batch_at("train", s.phase2.batch, 1, seed=s.seed, augment=True)
    kl = losses.distillation_loss(model(x), teacher(x).detach(), 2.0)
    assert float(kl.detach()) > 1e-4
    total = total + 1.5 * kl
    expected = torch.autograd.grad(total, trained, allow_unused=True)
    for got, want in zip(rank.sums[1], expected, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-3, atol=1e-5)


def test_diverging_phase_raises_error_naming_setting(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, detector_of: Any
) -> None:
    broken = from_tensors(
        tiny_task.splits["train"].x, tiny_task.splits["train"].y, loss=lambda out, y: out.sum() * float("nan")
    )  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"Lower --phase1\.lr"):
        phase1.train_clean_model(tiny_model(), broken, tiny_settings(), SingleProcessContext())
    s = tiny_settings(**{"phase2.steps": 2})
    detector = detector_of(s)
    readout = detector.feature_readout
    readout.inputs = readout.inputs * float("nan")
    with pytest.raises(ModelError, match=r"Lower --phase2\.lr"):
        phase2.embed_watermark(tiny_model(), tiny_task, detector, s, SingleProcessContext())


def spread_detector(model: nn.Module, settings: Any, task: Task, graph: Any, owner: Any) -> Any:
    """Return the detector of a spread head with `model` as W0."""
    base_weights = loading.cpu_state(model)
    bases = commitment.measure_response_bases(model, base_weights, task, settings)
    (opening,), reference = commitment.commit_keys(
        model, base_weights, graph, task.input_spec, settings, owner, bases=bases
    )
    return WatermarkDetector(opening, reference)


def test_embed_watermark_with_spread_head_resumes_bit_for_bit(
    frequent_checkpoints: int,
    tiny_task: Task,
    tiny_settings: Settings,
    tiny_model: Maker,
    tiny_graph: dict[str, object],
    owner: Any,
) -> None:
    s = tiny_settings(
        head="spread", lambda2=1.0, **{"phase2.steps": 6, "phase2.lr": 2e-3, "perturbation.refresh_steps": 2}
    )
    assert s.r_func == "responses" and s.perturbation.kinds == ("fine_tuned",)
    detector, model, recorder = (
        spread_detector(tiny_model(), s, tiny_task, tiny_graph, owner),
        tiny_model(),
        ProgressRecorder(),
    )
    rows, measured = phase2.embed_watermark(model, tiny_task, detector, s, recorder)
    assert [row["step"] for row in rows] == [4, 6] and rows[1]["wm_loss"] < rows[0]["wm_loss"]
    final = loading.cpu_state(model)
    torch.manual_seed(99)
    again = tiny_model()
    rows_again, measured_again = phase2.embed_watermark(
        again, tiny_task, detector, s, ProgressRecorder(load_state(recorder.checkpoints[0]))
    )
    assert_equal(loading.cpu_state(again), final)
    assert without_seconds(rows_again) == without_seconds(rows) and measured_again == measured


def test_settings_with_r_func_in_responses_need_spread_head(tiny_settings: Settings) -> None:
    with pytest.raises(SettingsError, match="r-func: Only a spread head has responses"):
        tiny_settings(r_func="responses", **{"phase2.steps": 2})
