"""Test of the recognition study on a small network."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import recognition


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_separates_descendants_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "ATTACKS", ("none", "prune:ratio=0.5"))
    path = tmp_path / "rows.csv"
    arguments = ["x", str(path), "--models", "1", "--key-models", "1", "--keys", "3", "--attack-seeds", "1"]
    arguments += ["--task", "digits", "--width", "8", "--phase1.epochs", "2", "--phase2.steps", "60"]
    monkeypatch.setattr("sys.argv", arguments)
    recognition.main()
    rows = list(csv.DictReader(path.open()))
    statuses = {(row["group"], row["name"]): row["status"] for row in rows if row["keys"] == "0"}
    assert statuses[("descendant", "none")] == "accepted" == statuses[("descendant", "prune:ratio=0.5")]
    assert statuses[("independent", "trained")] in ("unrelated", "rejected")
    assert {len(row["matches"].split()) for row in rows if row["keys"] == "3"} == {3}
    recognition.main()
    assert list(csv.DictReader(path.open())) == rows
