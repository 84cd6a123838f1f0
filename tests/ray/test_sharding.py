"""Test of `--sharding fsdp` with two workers: the digest of the run with replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.job_harness import ROOT, JobLauncher

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

#: Sizes are multiples of 32, see `tests/unit/watermark/embedding/test_sharding.py`.
FACTORY = """
from dataclasses import replace

from tests.unit.attacks.text_examples import SPEC, text_task


def task():
    return replace(text_task(), input_spec=replace(SPEC, embedding=32, classes=4))
"""


def test_sharded_embedding_has_the_digest_of_replicas(jobs: JobLauncher, tmp_path: Path) -> None:
    (tmp_path / "shardedtask.py").write_text(FACTORY)
    flags = (
        "--task", "shardedtask:task", "--model", "transformer", "--width", "32", "--key-size", "128",
        "--phase1.optimizer", "adam", "--phase1.lr", "0.01", "--phase1.batch", "32", "--phase2.batch", "32",
        "--phase2.steps", "60", "--phase2.lr", "0.005", "--lambda2", "0", "--json",
    )  # fmt: skip
    results = {}
    for sharding in ("none", "fsdp"):
        storage = tmp_path / sharding
        job = jobs.embed(*flags, "--sharding", sharding, storage=storage, PYTHONPATH=f"{tmp_path}:{ROOT}")
        job.wait()
        results[sharding] = json.loads(job.out)
    assert results["fsdp"]["accepted"] and results["fsdp"]["matches"] == 128
    assert results["fsdp"]["model_digest"] == results["none"]["model_digest"]
