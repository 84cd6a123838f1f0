"""Attack runs that train and mark their own target with a registered scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mtlsign.config.attack import AttackSettings
from mtlsign.errors import DataError, SettingsError
from mtlsign.experiments.attack_runs.executor import LocalAttackBackend
from mtlsign.experiments.attack_runs.run import run_attack_job
from mtlsign.experiments.attack_runs.scheme_target import mark_base, prepare_base
from mtlsign.models.dcgan import DCGAN
from mtlsign.schemes.base import SchemeResult, SchemeSettings
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme
from mtlsign.storage.local import LocalStorage
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.worker import WorkerContext
from tests.unit.experiments.attack_runs.test_run import FACTORY
from tests.unit.tasks.test_torchvision_datasets import write_idx


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run on the tiny task."""
    (tmp_path / "schemetask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "task": "schemetask:task", "network": "resnet18", "width": 8, "lr": 0.02, "embed_batch": 16,
        "storage": str(tmp_path / "store"), "workers": 0, "seed": 3,
        "attacks": "int8,permute_channels,spoil:steps=2,batch=16",
    }  # fmt: skip


def run(values: dict[str, Any], **others: Any) -> dict[str, Any]:
    return run_attack_job(AttackSettings.of({**values, **others}), LocalAttackBackend())


def test_run_marks_network_and_attacks_it(values: dict[str, Any], tmp_path: Path) -> None:
    options = ("key_size=64", "strength=0.1")
    result = run(values, scheme="uchida", scheme_options=options, embed_steps=60, run="one")
    embedding = result["embedding"]
    assert (embedding["scheme"], embedding["needs_commitment"], embedding["steps"]) == ("uchida", True, 60)
    assert embedding["marked"]["accepted"] and not embedding["unmarked"]["accepted"]
    assert not embedding["other_key"]["accepted"] and embedding["deviation"] > 0
    assert result["bits_required"] == 40 and result["marked"] == 1
    rows = {row["attack"]: row for row in result["rows"]}
    assert rows["none"]["matches"] == embedding["marked"]["matched"] and rows["none"]["null_rate"] == 0.5
    assert rows["int8"]["accepted"] and rows["permute_channels"]["removed"] is True
    assert rows["spoil"]["status"] == "ok" and rows["spoil"]["images"] == 20
    files = {path.name for path in (tmp_path / "store" / "runs" / "one").iterdir()}
    assert "attacks.csv" in files and "base.safetensors" not in files
    assert json.loads((tmp_path / "store/runs/one/result.json").read_text())["model"] == "marked with uchida"


def test_run_with_changed_output_layer_builds_marked_network(values: dict[str, Any]) -> None:
    options = ("key_size=10", "intensity=0.4")
    attacks = "remove_outputs,permute_channels,transpose_input"
    result = run(values, scheme="new_label", scheme_options=options, embed_steps=40, attacks=attacks)
    rows = {row["attack"]: row for row in result["rows"]}
    assert rows["none"]["matches"] >= 9 and rows["permute_channels"]["matches"] == rows["none"]["matches"]
    assert rows["transpose_input"]["matches"] == rows["none"]["matches"], "queries pass the transform"
    assert (
        rows["remove_outputs"]["verdict"] == "not_verifiable" and rows["remove_outputs"]["points_lost"] <= 5
    )


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"scheme": "none"}, "Unknown scheme 'none'"),
        ({"scheme": "uchida", "model": "m"}, "marks its own model"),
        ({"scheme": "uchida", "kit": "k"}, "marks its own model"),
        ({"scheme": "uchida", "task": None}, "needs a task"),
        ({"scheme": "uchida", "scheme_options": ("key_size=5000",)}, "scheme: The scheme cannot mark"),
        ({"scheme": "uchida", "scheme_options": ("size=1",)}, "no option of 'uchida'"),
        ({"scheme": "uchida", "set": ("stem",)}, "set: 'stem' is not NAME=VALUE"),
        ({"scheme": "uchida", "set": ("width=16",)}, "'width' does not belong to the training of"),
        ({"scheme": "uchida", "set": ("phase2.steps=9",)}, "'phase2.steps' does not belong to the training"),
        ({"scheme": "uchida", "set": ("phase1.epochs=x",)}, "phase1.epochs: "),
    ],
)
def test_invalid_scheme_settings_write_nothing(
    values: dict[str, Any], others: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as raised:
        run(values, **others)
    assert message in str(raised.value)
    assert not list((tmp_path / "store").rglob("settings.json"))


class RecordingScheme(MTLSignScheme):
    """Scheme that keeps the options of its embedding."""

    options: ClassVar[dict[str, Any]] = {}

    def embed(
        self, model: nn.Module, task: Task, key: MTLSignKey, settings: SchemeSettings, worker: WorkerContext
    ) -> SchemeResult:
        self.options.update(settings.options)
        return super().embed(model, task, key, settings, worker)


@pytest.fixture
def mnist_values(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on 40 images in the layout of MNIST."""
    write_idx(tmp_path, "MNIST")
    return {
        "scheme": "mtlsign", "task": "mnist", "data": str(tmp_path), "width": 16, "embed_steps": 1,
        "embed_batch": 8, "min_evidence_bits": 40,
    }  # fmt: skip


def test_set_changes_training_of_unmarked_network(mnist_values: dict[str, Any]) -> None:
    chosen = ("stem=cifar", "phase1.epochs=2", "phase1.weight-decay=0.01")
    plan = prepare_base(AttackSettings.of({**mnist_values, "set": chosen}))
    phase1 = plan.settings.phase1
    assert (plan.settings.stem, phase1.epochs, phase1.weight_decay) == ("cifar", 2, 0.01)
    assert plan.architecture["stem"] == "cifar" and plan.settings.phase2.margin == 8.5


@pytest.mark.parametrize(
    ("option", "margin"), [("key_size=1024", 8.5), ("key_size=256", 16), ("head=keyed", 4)]
)
def test_margin_of_image_task_is_that_of_the_embedding(
    mnist_values: dict[str, Any], option: str, margin: float
) -> None:
    plan = prepare_base(AttackSettings.of({**mnist_values, "scheme_options": (option,)}))
    assert plan.settings.phase2.margin == margin


@pytest.mark.parametrize(
    ("scheme", "head", "n", "distillation", "lambda1"),
    [("mtlsign_paper", "free", 600, 0, 0.1), ("mtlsign_keyed", "keyed", 1024, 4, 0.001)],
)
def test_scheme_of_preset_has_settings_of_the_preset(
    mnist_values: dict[str, Any], scheme: str, head: str, n: int, distillation: float, lambda1: float
) -> None:
    settings = prepare_base(AttackSettings.of({**mnist_values, "scheme": scheme})).settings
    assert (settings.head, settings.key_size, settings.lambda1) == (head, n, lambda1)
    assert settings.phase2.distillation == distillation


def test_image_task_is_marked_with_defaults_of_the_embedding(
    mnist_values: dict[str, Any], tmp_path: Path
) -> None:
    settings = AttackSettings.of(mnist_values)
    plan = replace(prepare_base(settings), scheme=RecordingScheme())
    mark_base(plan, settings, LocalStorage(tmp_path / "run"), lambda _: None)
    expected = {
        "phase2.margin": 8.5, "phase2.distillation": 40.0, "phase2.task_loss": 10.0, "phase2.lr": 5e-4,
        "phase2.temperature": 2.0, "phase2.other_layers_lr_scale": 0.3,
    }  # fmt: skip
    assert RecordingScheme.options == expected


def test_transfer_reports_bits_and_no_loss_on_owners_task(values: dict[str, Any]) -> None:
    options = ("key_size=64", "strength=0.1")
    result = run(
        values, scheme="uchida", scheme_options=options, embed_steps=60, transfer_task=values["task"],
        attacks="transfer:epochs=1,batch=16,to=half/task",
    )  # fmt: skip
    rows = {row["parameters"].partition(" ")[0]: row for row in result["rows"]}
    for to, classes in (("to=half", 2), ("to=task", 4)):
        row = rows[to]
        assert row["status"] == "ok" and row["n"] == 64 and row["evidence_bits"] > 0, row
        assert row["primary_after"] is None and row["points_lost"] is None and row["removed"] is None
        assert f"another task of {classes} classes, with a metric of" in row["reason"]


def test_unknown_transfer_task_is_refused_before_training(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Unknown task 'mnits'"):
        run(values, scheme="uchida", transfer_task="mnits", attacks="transfer:to=task")
    assert not (tmp_path / "store").exists()


def test_generator_is_marked_and_attacked(tmp_path: Path) -> None:
    weights = tmp_path / "generator.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = DCGAN(channels=1, classes=64, width=8)
    weights.write_bytes(serialize_safetensors(generator.state_dict()))
    values = {
        "task": "gan-digits", "width": 8, "weights": str(weights), "embed_batch": 16, "workers": 0,
        "embed_steps": 80, "min_evidence_bits": 12, "storage": str(tmp_path / "store"), "run": "gan",
        "attacks": "int8,ftal:epochs=1,batch=32,lr=0.0005,scale_filters,extract",
    }  # fmt: skip
    options = ("key_size=16", "part=signs", "lr=0.05", "sign_strength=20")
    result = run(values, scheme="ipr_gan", scheme_options=options)
    embedding = result["embedding"]
    assert embedding["marked"]["matched"] == 16 and not embedding["unmarked"]["accepted"]
    rows = {row["attack"]: row for row in result["rows"]}
    assert rows["int8"]["accepted"] and rows["ftal"]["matches"] == 16 and rows["ftal"]["steps"] > 0
    assert not rows["scale_filters"]["accepted"] and abs(rows["scale_filters"]["points_lost"]) < 0.1
    assert rows["extract"]["status"] == "not_applicable" and "images" in rows["extract"]["reason"]
