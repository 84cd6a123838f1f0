"""Tests of `--resume` of attack runs with damaged rows or rows of another target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.attack import AttackSettings
from mtlsign.errors import ArtifactError
from mtlsign.experiments.attack_runs.results import COLUMNS
from mtlsign.experiments.attack_runs.run_folder import AttackRun
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.watermark.kit import OwnerKit
from tests.unit.watermark.keys.examples import OPENING

TARGET = AttackTarget(
    tensors=b"marked", kit=OwnerKit(OPENING, b"reference", b"", None, {}), architecture={"arch": "resnet18"},
    trusted_factory=None, task="digits", data=None, download=False, split_seed=0, extra_data_fraction=0.0,
    learning_rate=0.1, other_marked_models=(), min_evidence_bits=120.0,
)  # fmt: skip
ROW: dict[str, Any] = {
    **dict.fromkeys(COLUMNS), "attack": "int8", "parameters": "", "seed": 0, "kind": "removal",
    "status": "ok", "wm_accuracy": 1.0, "evidence_bits": 128.0, "accepted": True, "primary_after": 0.5,
}  # fmt: skip


@pytest.fixture
def run(store_dir: str) -> AttackRun:
    opened, settings = AttackRun.open(AttackSettings.of({"storage": store_dir, "run": "a"}))
    opened.reserve_name(settings)
    opened.save_row(ROW, None, TARGET)
    return opened


def row_file(run: AttackRun) -> Path:
    (path,) = (Path(run.folder.uri) / "rows").iterdir()
    return path


def changed(**fields: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != name}).encode()


def test_rows_of_same_target_are_returned(run: AttackRun) -> None:
    assert run.rows(TARGET) == [ROW]
    run.save_row(ROW | {"attack": "noise", "status": "failed"}, None, TARGET)
    assert run.rows(TARGET) == [ROW], "a failed attack is repeated"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged. Delete it"),
        (lambda _: b"", "is damaged. Delete it"),
        (lambda _: b"[]", "is damaged. Delete it"),
        (lambda _: b"\xff", "is damaged. Delete it"),
        (changed(evidence_bits="many"), "is damaged. Delete it"),
        (changed(accepted=3), "is damaged. Delete it"),
        (changed(attack="int4"), "is damaged. Delete it"),
        (without("primary_after"), "is damaged. Delete it"),
        (without("status"), "is damaged. Delete it"),
        (without("target"), "belongs to another model, key or task"),
        (changed(target="0" * 64), "belongs to another model, key or task"),
    ],
)
def test_rows_with_damaged_file_raise(damage: Callable[[bytes], bytes], message: str, run: AttackRun) -> None:
    path = row_file(run)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=rf"^resume: rows/{path.name} of run 'a' {message}"):
        run.rows(TARGET)


@pytest.mark.parametrize(
    "target",
    [
        replace(TARGET, tensors=b"other"),
        replace(TARGET, task="mnist"),
        replace(TARGET, split_seed=1),
        replace(TARGET, kit=replace(TARGET.kit, opening=replace(OPENING, signature=bytes(64)))),
        replace(TARGET, other_marked_models=(b"copy",)),
        replace(TARGET, public_base=b"base"),
        replace(TARGET, transfer_task="mnist"),
    ],
    ids=["model", "task", "split", "key", "other models", "public base", "transfer task"],
)
def test_rows_of_other_target_raise(target: AttackTarget, run: AttackRun) -> None:
    with pytest.raises(ArtifactError, match="belongs to another model, key or task"):
        run.rows(target)
