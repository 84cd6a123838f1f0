"""Jobs on a task of instances: embed, verify, attack and sweep, by their settings alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.config.attack import AttackSettings
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import ModelError
from mtlsign.experiments.attack_runs.executor import LocalAttackBackend
from mtlsign.experiments.attack_runs.run import run_attack_job
from mtlsign.experiments.sweeps.backend import LocalSweepBackend
from mtlsign.experiments.sweeps.run import run_sweep_job
from mtlsign.models import architectures
from mtlsign.watermark.embedding.pipeline import LocalEmbeddingBackend, run_embedding_job
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import verify_with_kit
from tests.unit.tasks.segmentation.layouts import write_camvid, write_pennfudan, write_voc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def settings(tmp_path: Path, owner: Identity) -> dict[str, Any]:
    """Settings of a job of seconds on a generated folder of CamVid's layout."""
    write_camvid(tmp_path / "data", (16, 2, 2))
    owner.save(tmp_path / "identity.json", None)
    return {
        "task": "camvid", "data": tmp_path / "data", "model": "cascade-resnet18", "width": 4,
        "storage": str(tmp_path / "store"), "owner": str(tmp_path / "identity.json"), "workers": 0,
        "key_size": 256, "phase1.epochs": 1, "phase1.batch": 4, "phase2.steps": 14, "phase2.batch": 1,
        "phase2.lr": 0.02, "lambda1": 0.1, "insecure_test_key": True,
    }  # fmt: skip


def test_jobs_embed_verify_and_attack_a_detector(settings: dict[str, Any]) -> None:
    embedded = run_embedding_job(EmbedSettings.of(settings), LocalEmbeddingBackend())
    result = embedded.result
    assert result["status"] == "accepted" and 0 <= result["primary_marked"] <= 1
    places = {"kit": result["kit"], "owner": settings["owner"]}
    (verdict,) = verify_with_kit(VerifySettings.of({"model": [result["model_path"]], **places}))
    assert (verdict.status, verdict.matches) == ("accepted", embedded.verdict.matches)
    attacks = "ftdet:epochs=1,prune:ratio=0.5,null_space:energy=0.97,rtll:epochs=1"
    run = run_attack_job(
        AttackSettings.of(
            {
                "model": result["model_path"], **places, "data": settings["data"], "attacks": attacks,
                "storage": settings["storage"], "workers": 0,
            }
        ),
        LocalAttackBackend(),
    )  # fmt: skip
    states = {row["attack"]: row["status"] for row in run["rows"]}
    assert {name: states[name] for name in ("none", "ftdet", "prune", "null_space")} == dict.fromkeys(
        ("none", "ftdet", "prune", "null_space"), "ok"
    )
    assert states["rtll"] != "ok"


@pytest.mark.parametrize(
    ("task", "write"), [("pennfudan", write_pennfudan), ("voc", write_voc)], ids=["pennfudan", "voc"]
)
def test_jobs_embed_and_verify_on_other_official_layouts(
    task: str, write: Callable[[Path], None], settings: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / "data")
    embedded = run_embedding_job(EmbedSettings.of(settings | {"task": task}), LocalEmbeddingBackend())
    places = {"kit": embedded.result["kit"], "owner": settings["owner"]}
    (verdict,) = verify_with_kit(VerifySettings.of({"model": [embedded.result["model_path"]], **places}))
    assert (verdict.status, verdict.matches) == ("accepted", embedded.verdict.matches)


def test_job_starts_from_a_pretrained_body(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    body = architectures.build(
        architectures.architecture_for("timm/mobilenetv3_small_050", channels=3, classes=10)
    )
    torch.save(body.state_dict(), tmp_path / "body.pth")
    lines: list[str] = []
    embedded = run_embedding_job(
        EmbedSettings.of(
            settings
            | {"model": "cascade-timm/mobilenetv3_small_050", "phase1.lr": 1e-6}
            | {"phase1.initial_weights": str(tmp_path / "body.pth")}
        ),
        LocalEmbeddingBackend(),
        log=lines.append,
    )
    assert embedded.result["status"] == "accepted"
    assert any("starts from" in line for line in lines)
    stem = embedded.tensors["backbone.body.conv_stem.weight"]
    assert torch.nn.functional.cosine_similarity(stem.flatten(), body.conv_stem.weight.flatten(), dim=0) > 0.5


def test_job_with_a_classifier_names_the_detectors(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="returns labels, and the task needs instances") as error:
        run_embedding_job(EmbedSettings.of(settings | {"model": "resnet18"}), LocalEmbeddingBackend())
    assert error.value.field == "model"


def space() -> dict[str, object]:
    """Return the search space of the test below: one cell."""
    return {
        "task": "camvid", "model": "cascade-resnet18", "width": 4, "key_size": 256, "phase1.epochs": 1,
        "phase1.batch": 4, "phase2.steps": 14, "phase2.batch": 1, "phase2.lr": 0.02, "lambda1": 0.1,
        "lambda2": {"grid_search": [0.0]},
    }  # fmt: skip


def test_sweep_marks_a_detector(settings: dict[str, Any]) -> None:
    sweep = SweepSettings.of(
        {
            "space": f"{__name__}:space", "attacks": "prune:ratio=0.3", "workers": 0,
            "data": settings["data"], "storage": settings["storage"], "max_accuracy_drop": 100,
        }
    )  # fmt: skip
    rows = run_sweep_job(sweep, LocalSweepBackend())["rows"]
    assert {(row["status"], row["evidence_bits"] > 120) for row in rows} == {("ok", True)}
