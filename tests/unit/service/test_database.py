"""Database of the service: bounds on what it stores for one token."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mtlsign.service.database import VERSION, Database, Job, QueueLimits
from mtlsign.service.problems import Problem

LIMITS = QueueLimits(10**6, 2**30, 10**6, 2**30)


def test_delete_expired_keeps_newest_requests_of_each_token(tmp_path: Path) -> None:
    database = Database(tmp_path / "service.sqlite")

    def add(name: str, token: str, created: float, answered: bool = True) -> None:
        job = Job(name, token, created, None, 100, b"")
        database.add(job, [b"claim"] * 100, None, "owner", 1e12, LIMITS)
        if answered:
            database.save_results(name, [(0, {"problem": {}}, None)])
            database.finish(name)

    add("open", "a", 0, answered=False)
    for number in range(5):
        add(f"a{number}", "a", 1 + number)
    add("b0", "b", 0)
    database.delete_expired(1e9, 250)
    names = {name for (name,) in database.fetch_all("SELECT id FROM jobs")}
    assert names == {"open", "a3", "a4", "b0"}
    assert {job for (job,) in database.fetch_all("SELECT job FROM results")} == {"a3", "a4", "b0"}
    database.close()


@pytest.mark.parametrize(
    ("version", "fix"), [(VERSION - 1, "Use a new --state-dir."), (VERSION + 1, "Update mtlsign.")]
)
def test_database_of_other_version_is_refused_with_fix(version: int, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "service.sqlite"
    Database(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(Problem) as caught:
        Database(path)
    assert caught.value.detail == f"The database has version {version}. {fix}"
