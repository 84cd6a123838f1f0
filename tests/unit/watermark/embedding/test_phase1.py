"""Tests of phase 1."""

from __future__ import annotations

import pytest
import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.tasks import Task
from mtlsign.watermark.embedding import phase1
from mtlsign.watermark.embedding.checkpoint_identity import phase1_identity
from mtlsign.watermark.embedding.run_folder import load_state
from tests.unit.watermark.embedding.phase_helpers import (
    Maker,
    ProgressRecorder,
    Settings,
    assert_equal,
    without_seconds,
)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.02), ("adam", 0.002)])
def test_train_clean_model_resumes_bit_for_bit(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker, optimizer: str, rate: float
) -> None:
    s = tiny_settings(**{"phase1.epochs": 3, "phase1.optimizer": optimizer, "phase1.lr": rate})
    recorder, model = ProgressRecorder(), tiny_model()
    start = loading.cpu_state(model)
    rows = phase1.train_clean_model(model, tiny_task, s, recorder)
    assert [row["epoch"] for row in rows] == [1, 2, 3] and len(recorder.checkpoints) == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    final = loading.cpu_state(model)
    assert any(not torch.equal(start[n], final[n]) for n in start if n.endswith("running_mean"))
    for at in range(3):
        again = tiny_model(seed=5)
        rows_again = phase1.train_clean_model(
            again, tiny_task, s, ProgressRecorder(load_state(recorder.checkpoints[at]))
        )
        assert_equal(loading.cpu_state(again), final)
        assert without_seconds(rows_again) == without_seconds(rows)


def test_train_clean_model_without_optimizer_uses_sgd(
    tiny_task: Task, tiny_settings: Settings, tiny_model: Maker
) -> None:
    """A run of an earlier version names no optimizer."""
    named = tiny_settings(**{"phase1.epochs": 1, "phase1.lr": 0.02})
    states = []
    for settings in (named, named.updated({"phase1.optimizer": None})):
        model = tiny_model()
        phase1.train_clean_model(model, tiny_task, settings, ProgressRecorder())
        states.append(loading.cpu_state(model))
    assert_equal(*states)


def test_phase1_identity_depends_on_adam_and_omits_sgd() -> None:
    sgd, adam = (EmbedSettings.of({"phase1.optimizer": name, "phase1.lr": 0.1}) for name in ("sgd", "adam"))
    earlier = sgd.updated({"phase1.optimizer": None})
    assert phase1_identity(earlier) == phase1_identity(sgd) != phase1_identity(adam)


@pytest.mark.parametrize("name", ["phase1.initial_weights", "adapter", "tokenizer"])
def test_phase1_identity_names_what_w0_starts_from(name: str) -> None:
    plain, first, second = (EmbedSettings.of({name: value}) for value in (None, "a", "b"))
    assert len({phase1_identity(settings) for settings in (plain, first, second)}) == 3
