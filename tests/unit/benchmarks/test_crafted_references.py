"""Tests of crafted references, and of the evidence that they would have without the rules."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import crafted_references
from benchmarks.crafted_references import (
    COLUMNS,
    COUNTS,
    attempts,
    judge,
    ledger_reason,
    make_forger,
    write_summary,
)
from benchmarks.reference_forger import Forger, LabelFitter
from mtlsign.config import cli
from mtlsign.config.embed import EmbedSettings

SETTINGS = ["--task", "digits", "--width", "8", "--phase1.epochs", "1", "--phase2.steps", "30"]


@pytest.fixture(scope="module")
def forger() -> Forger:
    settings = cli.parse(EmbedSettings, SETTINGS, description="").with_defaults()
    return make_forger(settings.updated({"insecure_test_key": True}))


def test_counts_of_a_study_are_a_thousand() -> None:
    assert sum(COUNTS.values()) == 1000


def test_fitted_reference_matches_its_key_only_without_the_digest(forger: Forger) -> None:
    fitter = LabelFitter(forger, 0)
    fixed, signed, gradient = (fitter.attempt(method) for method in ("fixed", "signed", "gradient"))
    for attempt in (fixed, signed, gradient):
        assert attempt.target_bits is not None and attempt.target_bits > 500
    assert judge(forger, fixed)["status"] == judge(forger, gradient)["status"] == "inadmissible"
    row = judge(forger, signed)
    assert row["status"] == "rejected" and float(str(row["evidence_bits"])) < 40


def test_search_over_nonces_gains_no_more_than_the_logarithm_of_the_tries(forger: Forger) -> None:
    best = [forger.best_key(forger.own.raw_bytes, "search", tries)[1] for tries in (1, 64)]
    assert best[0] <= best[1] < 40


@pytest.mark.parametrize("family", ["extreme", "copied", "layers", "replayed"])
def test_crafted_references_are_not_accepted(forger: Forger, family: str) -> None:
    count = {"extreme": 13, "copied": 2, "layers": 1, "replayed": 9}[family]
    statuses = [str(judge(forger, attempt)["status"]) for attempt in attempts(forger, family, 0, count)]
    assert len(statuses) == count and set(statuses) <= {"inadmissible", "rejected", "unrelated"}
    assert {"extreme": 4, "replayed": 5}.get(family, 0) <= statuses.count("inadmissible")


def test_trained_head_needs_a_commitment(forger: Forger) -> None:
    (attempt,) = attempts(forger, "trained head", 0, 1)
    assert judge(forger, attempt)["status"] == "needs_commitment"


def test_opening_of_another_party_is_accepted_for_its_signer_alone(forger: Forger) -> None:
    *_, replayed = itertools.islice(attempts(forger, "replayed", 0, 9), 9)
    assert replayed.by_owner and judge(forger, replayed)["reason"] == "signer_mismatch"
    assert ledger_reason(forger, forger.sign(forger.own.raw_bytes, "own")) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_study_continues_after_its_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    monkeypatch.setattr("sys.argv", ["x", str(path), "--share", "0.01", *SETTINGS[:-1], "60"])
    crafted_references.main()
    lines = path.read_text().splitlines(keepends=True)
    rows = list(csv.DictReader(lines))
    assert rows[0]["family"] == "control" and rows[0]["status"] == "accepted"
    assert "accepted" not in {row["status"] for row in rows[1:]}
    path.write_text("".join(lines[:-3]))
    crafted_references.main()
    continued = list(csv.DictReader(path.open()))
    timeless = [[{**row, "seconds": ""} for row in part] for part in (rows, continued)]
    assert timeless[0] == timeless[1]
    assert torch.get_num_threads() == 1


def test_summary_counts_verdicts_and_names_the_most_evidence(tmp_path: Path) -> None:
    values = [("fitted", "rejected", "9.5", "16", "980.0"), ("fitted", "inadmissible", "0.0", "1", "1024.0")]
    path, table = tmp_path / "rows.csv", tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="0.5")
        writer.writeheader()
        for row in values:
            columns = ("family", "status", "evidence_bits", "tries", "target_bits")
            writer.writerow(dict(zip(columns, row, strict=True)))
    write_summary(path, table)
    (summary,) = csv.DictReader(table.open())
    assert (summary["references"], summary["rejected"], summary["inadmissible"]) == ("2", "1", "1")
    assert (summary["accepted"], summary["most evidence"], summary["tries of it"]) == ("0", "9.5", "16")
    assert summary["evidence without the digest"] == "980 … 1024"
