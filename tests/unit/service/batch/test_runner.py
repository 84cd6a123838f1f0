"""Batch verification: chunks, a full queue, and errors after the first results."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ClaimError, ClusterError
from mtlsign.service.batch import runner
from mtlsign.service.batch.jsonl import ResultWriter
from mtlsign.service.database import Database, Job, QueueLimits
from mtlsign.service.state import AppState
from mtlsign.service.verifier.verifier import (
    InProcessVerifier,
    Verifier,
)
from tests.unit.service.fakes import InstantBackend
from tests.unit.service.fixtures import ClaimFixtures, fill_disk, result_status


def statuses_in_file(path: Path) -> list[str]:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    return [result_status(result) for result in results]


def test_verify_batch_splits_claims_and_reports_too_large_claim(
    claim_fixtures: ClaimFixtures, tmp_path: Path
) -> None:
    settings = ServiceSettings.of(
        {
            "state_dir": tmp_path / "s",
            "max_queued_mb_per_token": 1,
            "max_queued_mb": 2,
            "max_queued_claims_per_token": 3,
        }
    )
    heavy = claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "head": "x" * 300_000})
    too_large = claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "head": "x" * 1_200_000})
    claims = [heavy, heavy, too_large, *[claim_fixtures.claim() for _ in range(5)], None]
    with ResultWriter(tmp_path / "out" / "r.jsonl") as results:
        asyncio.run(runner.verify_batch(settings, InstantBackend(), claims, results.add))
    expected = ["rejected", "rejected", "too-large", *["rejected"] * 5, "bad-claim"]
    assert statuses_in_file(tmp_path / "out" / "r.jsonl") == expected
    assert results.tally == {"rejected": 7, "too-large": 1, "bad-claim": 1}


def test_verify_batch_with_full_queue_waits(
    claim_fixtures: ClaimFixtures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServiceSettings.of(
        {
            "state_dir": tmp_path / "s",
            "max_queued_claims": 2,
            "allowed_locations": [f"file://{claim_fixtures.folder}"],
        }
    )
    other = Database(settings.state_dir / "service.sqlite")
    other.add(Job("x", "other token", 1.0, None, 2, b""), [b"", b""], None, "", 9e9, QueueLimits(9, 9, 9, 9))
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 30.0)
    slept: list[float] = []
    original_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds == 5:  # Retry-After of the problem `busy`
            slept.append(seconds)
            other.finish("x")
        await original_sleep(0.01 if seconds == 5 else seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ResultWriter(tmp_path / "r.jsonl") as results:
        asyncio.run(
            runner.verify_batch(
                settings, InProcessVerifier(Verifier(settings)), [claim_fixtures.claim()], results.add
            )
        )
    assert statuses_in_file(tmp_path / "r.jsonl") == ["accepted"] and slept == [5]
    assert json.loads((tmp_path / "r.jsonl").read_text())["envelope"]


def test_verify_batch_after_disk_error_keeps_earlier_results(
    claim_fixtures: ClaimFixtures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after the first chunk: an error is raised and the first results are kept."""
    settings = ServiceSettings.of({"state_dir": tmp_path / "s", "max_claims": 2})
    databases: list[Database] = []
    original_open = AppState.open

    def recording_open(*args: Any) -> AppState:
        state = original_open(*args)
        databases.append(state.database)
        return state

    monkeypatch.setattr(AppState, "open", recording_open)
    heavy = claim_fixtures.claim(bundle={**claim_fixtures.right_bundle, "head": "x" * 900_000})
    with pytest.raises(ClusterError, match=r"batch: .*kept"), ResultWriter(tmp_path / "r.jsonl") as results:

        def add(chunk: list[dict[str, Any]]) -> None:
            results.add(chunk)
            fill_disk(databases[0])

        asyncio.run(
            runner.verify_batch(
                settings,
                InstantBackend(),
                [claim_fixtures.claim(), claim_fixtures.claim(), heavy, heavy],
                add,
            )
        )
    assert (
        statuses_in_file(tmp_path / "r.jsonl.part") == ["rejected"] * 2
        and not (tmp_path / "r.jsonl").exists()
    )
    with pytest.raises(ClaimError, match="out"), ResultWriter(tmp_path / "r.jsonl.part" / "r"):
        pass
