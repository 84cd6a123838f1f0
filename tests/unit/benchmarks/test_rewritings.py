"""Test of the study of free changes on a small network."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import rewritings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_reads_rewritten_networks_continues_and_summarises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = tmp_path / "rows.csv", tmp_path / "table.csv"
    arguments = ["x", str(path), "--suspects", "none", "noise:sigma=0.4"]
    arguments += ["--changes", "none", "permute_channels", "rotate_stream"]
    settings = ["--task", "digits", "--width", "8", "--phase1.epochs", "2", "--phase2.steps", "60"]
    monkeypatch.setattr("sys.argv", arguments + settings)
    rewritings.main()
    rows = list(csv.DictReader(path.open()))
    assert [row["status"] for row in rows] == ["accepted", "accepted", "not applicable"] * 2
    assert [row["matches"] for row in rows[::3]] == [row["matches"] for row in rows[1::3]]
    rewritings.main()
    assert list(csv.DictReader(path.open())) == rows
    monkeypatch.setattr("sys.argv", ["x", str(path), "--summary", str(table)])
    rewritings.main()
    assert [row["change"] for row in csv.DictReader(table.open())] == ["none", "permute_channels"]
