"""Scenario: a verdict on a hostile file does not depend on the process, its threads or its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import mtlsign
from mtlsign.storage.locations import open_storage
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, write_kit
from tests.helpers.job_harness import ROOT
from tests.unit.service.invalid_models import INVALID_FILES
from tests.unit.watermark.scenarios.hostile_files import MODEL_FILES, model_file
from tests.unit.watermark.scenarios.verify_files import verdicts

SPREAD: dict[str, Any] = {
    "head": "spread",
    "key_size": 128,
    "statistic": "weighted",
    "phase2.steps": 30,
    "phase2.batch": 16,
    "phase2.lr": 0.005,
    "phase2.margin": 2.0,
    "insecure_test_key": True,
}

#: Hash seed, threads, oneDNN, and whether the libraries use the oldest instructions.
PROCESSES = [
    ("0", "1", "on", False),
    ("1", "2", "off", False),
    ("2", "1", "off", True),
    ("3", "2", "on", True),
    ("random", "2", "on", False),
]
OLDEST_INSTRUCTIONS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}
QUICK_FILES = ["two transformers spellings", "weight norm and decoys", "int8", "nine places"]


def write_folder(folder: Path, kits: Iterable[OwnerKit], files: dict[str, bytes], owner: Identity) -> None:
    """Write files and kits where `verify_files` expects them."""
    for kit in kits:
        write_kit(open_storage(str(folder)), kit, EncryptionSecret.from_kit_key(owner.kit_key))
    (folder / "files").mkdir()
    for name, data in files.items():
        (folder / "files" / f"{name.replace('/', ' ')}.safetensors").write_bytes(data)


def verdicts_of_process(
    folder: Path, seed: str, threads: str, onednn: str, oldest: bool
) -> dict[str, dict[str, Any]]:
    """Return the verdicts of a new process by kit and file."""
    environment = (
        os.environ
        | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        | {"OMP_WAIT_POLICY": "passive"}
    )
    command = [sys.executable, "-m", "tests.unit.watermark.scenarios.verify_files", str(folder), onednn]
    output = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | (OLDEST_INSTRUCTIONS if oldest else {}),
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(output.stdout)
    return results


def assert_equal(results: list[dict[str, dict[str, Any]]]) -> None:
    first, *others = results
    for other in others:
        assert other.keys() == first.keys()
        differences = {name: (first[name], other[name]) for name in first if first[name] != other[name]}
        assert not differences


def statuses(results: dict[str, dict[str, Any]], reader: str) -> set[str]:
    return {result[reader].get("status") for result in results.values()}


@pytest.mark.slow
@pytest.mark.timeout(3600)  # over six minutes of processor time, in five processes
def test_verify_in_five_processes_gives_equal_verdicts_on_every_hostile_file(
    marked_model: tuple[dict[str, Tensor], Any],
    tiny_model: Callable[..., nn.Module],
    tiny_task: Task,
    tiny_graph: dict[str, object],
    owner: Identity,
    tmp_path: Path,
) -> None:
    keyed = marked_model[1]
    spread = mtlsign.embed(
        tiny_model(), tiny_task, trained=True, identity=owner, architecture=tiny_graph, **SPREAD
    )
    files = {f"invalid, {name}": data for name, data in INVALID_FILES.items()}
    files |= {f"keyed, {name}": model_file(name, keyed.tensors) for name in MODEL_FILES}
    files |= {f"spread, {name}": model_file(name, spread.tensors) for name in MODEL_FILES}
    write_folder(tmp_path, [keyed.kit, spread.kit], files, owner)
    results = [verdicts_of_process(tmp_path, *process) for process in PROCESSES]
    assert len(results[0]) == 2 * len(INVALID_FILES) + 2 * len(MODEL_FILES)
    assert_equal(results)
    assert {"accepted", "not_verifiable"} < statuses(results[0], "job")
    assert {"accepted", "not_verifiable"} < statuses(results[0], "service")


def test_verify_in_other_process_gives_equal_verdicts_on_hostile_files(
    marked_model: tuple[dict[str, Tensor], Any], owner: Identity, tmp_path: Path
) -> None:
    _, result = marked_model
    files = {name: model_file(name, result.tensors) for name in QUICK_FILES}
    write_folder(tmp_path, [result.kit], files, owner)
    results = [verdicts(tmp_path), verdicts_of_process(tmp_path, "1", "1", "off", oldest=True)]
    assert_equal(results)
    assert statuses(results[0], "job") == {"accepted", "not_verifiable"}
