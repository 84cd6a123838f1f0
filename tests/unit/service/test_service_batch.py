"""Bulk work and the operator's commands, without Ray: chunks, room, results as they come, clean errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from test_service_trouble import fill  # type: ignore[import-not-found]
from test_service_verifications import Slow  # type: ignore[import-not-found]

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ClaimError, ClusterError, SettingsError
from mtlsign.service import __main__ as command
from mtlsign.service.auth import tokens
from mtlsign.service.batch import runner
from mtlsign.service.batch.jsonl import ResultWriter
from mtlsign.service.database import Database, Job, QueueLimits
from mtlsign.service.state import AppState
from mtlsign.service.verifier.verifier import (
    InProcessVerifier,
    VerificationBatchResult,
    VerificationTask,
    Verifier,
)
from tests.unit.service.fixtures import Goods

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own


class Quick(Slow):
    """Answers at once; `before` is called first."""

    def __init__(self, before: Any = lambda _: None) -> None:
        super().__init__()
        self.go.set()
        self.before = before

    async def verify(self, task: VerificationTask) -> VerificationBatchResult:
        self.before(task)
        return await super().verify(task)


def lines(path: Path) -> list[str]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [r["verdict"]["status"] if "verdict" in r else r["problem"]["type"][20:] for r in found]


def test_chunks_fit_the_room_and_a_claim_that_never_fits_is_its_own_problem(
    goods: Goods, tmp_path: Path
) -> None:
    settings = ServiceSettings.of({"state": tmp_path / "s", "token_mb": 1, "queue_mb": 2, "token_claims": 3})
    heavy = goods.claim(bundle={**goods.right, "head": "x" * 300_000})
    never = goods.claim(bundle={**goods.right, "head": "x" * 1_200_000})
    claims = [heavy, heavy, never, *[goods.claim() for _ in range(5)], None]
    with ResultWriter(tmp_path / "out" / "r.jsonl") as results:
        asyncio.run(runner.verify_batch(settings, Quick(), claims, results.add))
    wanted = ["rejected", "rejected", "too-large", *["rejected"] * 5, "bad-claim"]
    assert lines(tmp_path / "out" / "r.jsonl") == wanted
    assert results.tally == {"rejected": 7, "too-large": 1, "bad-claim": 1}


def test_a_full_queue_is_waited_for(goods: Goods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServiceSettings.of(
        {"state": tmp_path / "s", "queue_claims": 2, "allow": f"file://{goods.folder}"}
    )
    other = Database(settings.state / "service.sqlite")
    other.add(Job("x", "theirs", 1.0, None, 2, b""), [b"", b""], None, "", 9e9, QueueLimits(9, 9, 9, 9))
    monkeypatch.setattr("mtlsign.service.queue.job_queue.LEASE_S", 30.0)
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds == 5:  # what the service says
            slept.append(seconds)
            other.finish("x")
        await real(0.01 if seconds == 5 else seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ResultWriter(tmp_path / "r.jsonl") as results:
        asyncio.run(
            runner.verify_batch(settings, InProcessVerifier(Verifier(settings)), [goods.claim()], results.add)
        )
    assert lines(tmp_path / "r.jsonl") == ["accepted"] and slept == [5]
    assert json.loads((tmp_path / "r.jsonl").read_text())["envelope"]


def test_what_was_answered_outlives_an_error(
    goods: Goods, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after the first chunk: one line of an error, and the first results are there."""
    settings = ServiceSettings.of({"state": tmp_path / "s", "max_claims": 2})
    stores: list[Database] = []
    opened = AppState.open

    def spied(*args: Any) -> AppState:
        made = opened(*args)
        stores.append(made.store)
        return made

    monkeypatch.setattr(AppState, "open", spied)
    heavy = goods.claim(bundle={**goods.right, "head": "x" * 900_000})
    with pytest.raises(ClusterError, match=r"batch: .*kept"), ResultWriter(tmp_path / "r.jsonl") as results:

        def keep(found: list[dict[str, Any]]) -> None:
            results.add(found)
            fill(stores[0])

        asyncio.run(
            runner.verify_batch(settings, Quick(), [goods.claim(), goods.claim(), heavy, heavy], keep)
        )
    assert lines(tmp_path / "r.jsonl.part") == ["rejected"] * 2 and not (tmp_path / "r.jsonl").exists()
    with pytest.raises(ClaimError, match="out"), ResultWriter(tmp_path / "r.jsonl.part" / "r"):
        pass


@pytest.mark.parametrize("hours", ["0", "-5", "nan", "inf", "87601"])
def test_a_token_lives_for_a_sane_time(hours: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hours"):
        command.main(["token", "n", f"--hours={hours}", "--state", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()


def test_a_new_state_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for told in (True, False):
        command.main(["token", "n", "--hours", "2", "--state", str(tmp_path / "s")])
        out, err = capsys.readouterr()
        assert ("is new" in err) is told and len(out.split()) == 1
    store = Database(tmp_path / "s" / "service.sqlite")
    assert tokens.check(store, out.strip()).name == "n"
    ((created, expires),) = store.rows("SELECT created, expires FROM tokens LIMIT 1")
    assert expires - created == pytest.approx(7200)
