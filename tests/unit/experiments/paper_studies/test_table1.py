from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.attack import AttackSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.paper_studies import table1
from mtlsign.experiments.paper_studies.run import run_study
from mtlsign.experiments.paper_studies.table1 import requirement_table, tasks_that_run
from tests.unit.experiments.attack_runs.test_run import FACTORY


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a study on the tiny task; flexibility is also tried on digits."""
    (tmp_path / "judgedtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(table1, "FLEXIBILITY_TASKS", {"digits": {"width": 8}})
    return {
        "study": "table1", "task": "judgedtask:task", "width": 8, "seeds": 2, "embed_steps": 3,
        "storage": str(tmp_path / "store"), "embed_batch": 16, "attacks": "ftll:epochs=1",
        "schemes": "uchida,adi",
    }  # fmt: skip


def test_study_forges_tunes_and_tries_tasks_of_every_scheme(values: dict[str, Any]) -> None:
    uchida, adi = run_study(ReproduceSettings.of(values))["rows"]
    assert (uchida["n"], uchida["false claims accepted"], uchida["unambiguity"]) == (2, 2, "no")
    assert uchida["paper unambiguity"] == "no" and adi["paper unambiguity"] is None
    assert uchida["weakest under"].startswith("ftll")
    assert (uchida["tasks that run"], uchida["flexibility"], uchida["reason"]) == ("2 of 2", "yes", None)


def test_task_without_data_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table1, "FLEXIBILITY_TASKS", {"digits": {"width": 8}, **table1.FLEXIBILITY_TASKS})
    settings = AttackSettings.of({"scheme": "adi", "task": "digits", "data": str(tmp_path)})
    tried = tasks_that_run(settings)
    assert tried["digits"] == {"runs": True, "reason": None}
    assert tried["sst2@0.05"]["runs"] is None and "incomplete" in tried["sst2@0.05"]["reason"]
    assert tried["gan-digits"]["runs"] is False and "images with classes" in tried["gan-digits"]["reason"]


def result(seed: int, *, scheme: str = "adi", **changes: Any) -> dict[str, Any]:
    marked = {"evidence_bits": 100.0, "accepted": True}
    tuned = {
        "attack": "ftal",
        "parameters": "lr=full",
        "status": "ok",
        "accepted": True,
        "evidence_bits": 50.0,
    }
    return {
        "scheme": scheme, "seed": seed, "status": "ok",
        "embedding": {
            "access": "black-box", "needs_commitment": True, "marked": marked,
            "unmarked": {"evidence_bits": 1.0, "accepted": False}, "primary_clean": 0.9,
            "primary_marked": 0.895,
        },
        "rows": [{**tuned, "attack": "none", "accepted": False}, tuned],
        "forgery": {"accepted": False, "evidence_bits": 3.0},
        "tasks": {"digits": {"runs": True, "reason": None}} if seed == 0 else None,
        **changes,
    }  # fmt: skip


def judgements(*results: dict[str, Any]) -> tuple[Any, ...]:
    (row,) = requirement_table(results)
    return tuple(row[name] for name in ("unambiguity", "functionality", "robustness", "flexibility"))


def test_requirement_is_met_if_it_holds_for_every_seed() -> None:
    forged = {"accepted": True, "evidence_bits": 90.0}
    fallen = {"attack": "rtal", "parameters": "", "status": "ok", "accepted": False, "evidence_bits": 60.0}
    costly = {**result(1)["embedding"], "primary_marked": 0.88}
    text = {"runs": False, "reason": "No images."}
    assert judgements(result(0), result(1)) == ("yes", "yes", "yes", "yes")
    assert judgements(result(0), result(1, forgery=forged)) == ("no", "yes", "yes", "yes")
    also_unmarked = {**result(1)["embedding"], "unmarked": forged}
    assert judgements(result(0), result(1, embedding=also_unmarked)) == ("no", "yes", "yes", "yes")
    assert judgements(result(0), result(1, embedding=costly)) == ("yes", "no", "yes", "yes")
    assert judgements(result(0), result(1, rows=[fallen])) == ("yes", "yes", "no", "yes")
    assert judgements(result(0, tasks={"digits": text}), result(1)) == ("yes", "yes", "yes", "no")
    assert judgements(result(0, forgery=None)) == ("yes", "yes", "yes", "yes")


def test_unmeasured_requirement_is_empty() -> None:
    diverged = {"attack": "ftal", "parameters": "", "status": "diverged", "accepted": None}
    without_data = {"camvid": {"runs": None, "reason": "No folder."}}
    assert judgements(result(0, rows=[diverged], tasks=without_data)) == ("yes", "yes", None, None)


def test_row_names_weakest_tuning_reasons_and_judgements_of_the_paper() -> None:
    fallen = {
        "attack": "rtal",
        "parameters": "lr=1",
        "status": "ok",
        "accepted": False,
        "evidence_bits": 60.0,
    }
    tasks = {"digits": {"runs": True, "reason": None}, "sst2": {"runs": False, "reason": "No images."}}
    rows = result(0)["rows"]
    (row,) = requirement_table([result(0, scheme="deepsigns", rows=[*rows, fallen], tasks=tasks)])
    assert (row["weakest under"], row["fewest bits after tuning"]) == ("rtal lr=1", 60.0)
    assert (row["tasks that run"], row["reason"]) == ("1 of 2", "sst2: No images.")
    assert [row[f"paper {name}"] for name in ("unambiguity", "flexibility")] == ["yes", "no"]


def test_unsupported_scheme_has_reason_and_all_columns() -> None:
    unsupported = {"scheme": "riga", "seed": 0, "status": "not_supported", "reason": "No images."}
    first, row = requirement_table([result(0), unsupported])
    assert row["reason"] == "No images." and row["n"] == 0 and list(row) == list(first)
