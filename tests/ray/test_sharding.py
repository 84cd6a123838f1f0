"""Test of `--sharding fsdp` with two workers: the digest of the run with replicas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtlsign.tasks import Task
from tests.helpers.job_harness import SMALL, JobLauncher
from tests.helpers.job_session import JobSession
from tests.unit.attacks.text_examples import SPEC, text_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

FLAGS = (
    *SMALL, "--workers", "2", "--model", "transformer", "--width", "32", "--key-size", "128",
    "--phase1.optimizer", "adam", "--phase1.lr", "0.01", "--phase1.batch", "32", "--phase2.batch", "32",
    "--phase2.steps", "60", "--phase2.lr", "0.005", "--lambda2", "0", "--json",
)  # fmt: skip


def wide_text_task() -> Task:
    """Return texts with sizes in multiples of 32, see `tests/unit/watermark/embedding/test_sharding.py`."""
    return replace(text_task(), input_spec=replace(SPEC, embedding=32, classes=4))


def test_sharded_embedding_has_the_digest_of_replicas(
    jobs: JobLauncher, session: JobSession, tmp_path: Path
) -> None:
    task = ("--task", f"{__name__}:wide_text_task")
    results: dict[str, dict[str, Any]] = {}
    for sharding in ("none", "fsdp"):
        storage = ("--storage", str(tmp_path / sharding))
        job = session.run("embed", *FLAGS, *task, *jobs.as_owner, "--sharding", sharding, *storage)
        results[sharding] = json.loads(job.out)
    assert results["fsdp"]["accepted"] and results["fsdp"]["matches"] == 128
    assert results["fsdp"]["model_digest"] == results["none"]["model_digest"]
