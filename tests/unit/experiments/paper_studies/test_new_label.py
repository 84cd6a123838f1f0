from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.experiments.paper_studies import new_label
from mtlsign.experiments.paper_studies.run import run_study
from tests.unit.experiments.attack_runs.test_run import FACTORY


def result(seed: int, label: str, alpha: float, beta: float, **values: Any) -> dict[str, Any]:
    defaults = {"normal": 0.9, "key": 1.0 - 0.2 * seed, "rows": []}
    return {"seed": seed, "label": label, "alpha": alpha, "beta": beta, **defaults, **values}


def attacked(attack: str, parameters: str, normal: float, key: float) -> dict[str, Any]:
    return {"attack": attack, "parameters": parameters, "status": "ok", "primary_after": normal,
            "wm_accuracy": key}  # fmt: skip


def test_settings_cross_at_attacked_one_for_both_labels() -> None:
    settings = new_label.panel_settings(45_000)
    assert len(settings) == len(set(settings)) == 2 * (len(new_label.ALPHAS) + len(new_label.BETAS) - 1)
    assert [s.label for s in settings if s.is_attacked] == ["new", "old"]
    assert settings[0].is_attacked and settings[0].name == "new-0.001-0.2"
    assert {s.alpha for s in settings if s.beta != new_label.BETA} == {0.001}


def test_few_images_have_settings_with_enough_key_samples() -> None:
    settings = new_label.panel_settings(9_000)
    assert settings[0].name == "new-0.05-0.2" and {s.alpha for s in settings} == {0.01, 0.05}
    assert {s.alpha for s in new_label.panel_settings(500)} == {0.05}


def test_table_has_panels_pruning_and_paper_values() -> None:
    centre = (new_label.LARGER_ALPHA, new_label.BETA)
    rows = [attacked("prune", "ratio=0.5", 0.8, 0.7), attacked("ftal", "lr=quarter", 0.95, 0.6)]
    results = [result(0, "new", *centre, rows=rows), result(1, "new", *centre, rows=rows),
               result(0, "new", 0.01, new_label.BETA), result(0, "old", *centre)]  # fmt: skip
    table = new_label.new_label_table(results, "mnist@0.1")
    new = [row for row in table if row["method"].startswith("new")]
    assert [(row["panel"], row["value"], row["n"]) for row in new] == [
        ("alpha", 0.01, 1), ("alpha", 0.05, 2), ("beta", 0.2, 2), ("prune", "ratio=0.5", 2),
        ("ftal", "lr=quarter", 2), ("before fine-tuning", "", 2),
    ]  # fmt: skip
    assert new[1]["key"] == pytest.approx(90) and new[1]["sd key"] == pytest.approx(20 * 0.5**0.5)
    assert (new[4]["normal"], new[4]["paper: normal"], new[4]["paper: key"]) == (95.0, 99.09, 99.92)
    assert (new[5]["paper: normal"], new[5]["paper: key"]) == (97.94, 99.89)
    old = [row for row in table if row["method"].startswith("old")]
    assert (old[-1]["paper: normal"], old[-1]["n"]) == (97.88, 1)
    assert all(row["paper: key"] is None for row in new_label.new_label_table(results, "digits"))


def test_study_marks_with_both_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labeltask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, value in (("ALPHAS", (0.05,)), ("BETAS", (0.4,)), ("BETA", 0.4)):
        monkeypatch.setattr(new_label, name, value)
    values = {
        "study": "new_label", "task": "labeltask:task", "width": 8, "seeds": 1, "embed_steps": 30,
        "embed_batch": 16, "attacks": "prune:ratio=0.1", "storage": str(tmp_path / "store"),
    }  # fmt: skip
    rows = run_study(ReproduceSettings.of(values))["rows"]
    assert [(row["panel"], row["method"][:3]) for row in rows] == [
        (panel, label)
        for label in ("new", "old")
        for panel in ("alpha", "beta", "prune", "before fine-tuning")
    ]  # fmt: skip
    by_panel = {(row["panel"], row["method"][:3]): row for row in rows}
    assert by_panel["alpha", "new"] == {**by_panel["beta", "new"], "panel": "alpha", "value": 0.05}
    assert by_panel["alpha", "new"]["key"] >= 80, (
        "the samples of verification are answered with the new class"
    )
