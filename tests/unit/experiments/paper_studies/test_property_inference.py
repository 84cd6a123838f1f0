from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import SettingsError
from mtlsign.experiments.paper_studies import property_inference
from mtlsign.experiments.paper_studies.run import run_study
from tests.unit.experiments.attack_runs.test_run import FACTORY


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a study of two networks in each group."""
    (tmp_path / "studiedtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "study": "property_inference", "task": "studiedtask:task", "width": 8, "seeds": 2, "seed": 5,
        "storage": str(tmp_path / "store"), "embed_steps": 2, "schemes": "uchida", "run": "s",
    }  # fmt: skip


def test_study_compares_groups_of_other_seeds_and_resumes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_base, seeds = property_inference.mark_base, []

    def interrupted(*arguments: Any) -> Any:
        seeds.append(arguments[1].seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return mark_base(*arguments)

    monkeypatch.setattr(property_inference, "mark_base", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(ReproduceSettings.of(values))
    resumed = {name: values[name] for name in ("storage", "task", "study")} | {"resume": "s"}
    result = run_study(ReproduceSettings.of(resumed))
    assert seeds == [7, 8, 8], "the networks of the marked group; the finished one is not repeated"
    pairs = [(row["group"], row["against"], row["n"]) for row in result["rows"]]
    assert pairs == [
        (group, against, 4)
        for group in ("unmarked", "uchida")
        for against in ("unmarked", "tuned", "tuned_adam", "phase2_without_mark")
    ]  # fmt: skip
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in result["rows"])
    assert [row["of"] for row in result["rows"]] == [0, 0, 0, 0, 2, 2, 2, 2]
    folder = tmp_path / "store" / "runs" / "s"
    assert sorted(path.name for path in (folder / "schemes").iterdir()) == [
        *(
            "phase2_without_mark-5.json",
            "phase2_without_mark-6.json",
            "tuned-5.json",
            "tuned-6.json",
            "tuned_adam-5.json",
            "tuned_adam-6.json",
            "uchida-7.json",
            "uchida-8.json",
        ),
        *(f"unmarked-{seed}.json" for seed in (5, 6, 7, 8)),
    ]
    assert not list(folder.rglob("base.safetensors"))


def test_one_network_in_each_group_raises_settings_error(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="seeds: Each group needs at least two networks"):
        run_study(ReproduceSettings.of({**values, "seeds": 1}))
