from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.experiments.paper_studies import scheme_studies
from mtlsign.experiments.paper_studies.run import run_study
from mtlsign.tasks import load_task
from tests.unit.experiments.attack_runs.test_run import FACTORY


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a study on the tiny task."""
    (tmp_path / "studiedtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        "task": "studiedtask:task", "width": 8, "seeds": 1, "storage": str(tmp_path / "store"),
        "embed_steps": 3, "embed_batch": 16, "attacks": "int8", "schemes": "adi,zhu2020", "run": "s",
    }  # fmt: skip


def test_schemes_study_writes_table_and_resumes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_attack, calls = scheme_studies.run_attack, []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_attack(*arguments, **keywords)

    monkeypatch.setattr(scheme_studies, "run_attack", interrupted)
    settings = ReproduceSettings.of({**values, "study": "schemes"})
    with pytest.raises(KeyboardInterrupt):
        run_study(settings)
    resumed = {name: values[name] for name in ("storage", "task")} | {"study": "schemes", "resume": "s"}
    lines: list[str] = []
    result = run_study(ReproduceSettings.of(resumed), log=lines.append)
    assert calls == ["none", "int8", "none", "none", "int8"], "finished schemes are not repeated"
    assert lines[:2] == [f"run s; if it is interrupted: --resume s --storage {values['storage']}",
                         "seed 0 · adi · ok"]  # fmt: skip
    assert [line.split(" · evidence")[0] for line in lines[2:]] == [
        "seed 0 · zhu2020 · the unmarked network is trained", "seed 0 · zhu2020 · marked with zhu2020",
        "seed 0 · zhu2020 · 1/2 none", "seed 0 · zhu2020 · 2/2 int8", "seed 0 · zhu2020 · ok",
    ]  # fmt: skip
    cells = [(row["scheme"], row["attack"], row["of"], row["null rate"]) for row in result["rows"]]
    assert cells == [
        ("adi", "none", 100, 0.25), ("adi", "int8", 100, 0.25),
        ("zhu2020", "none", 100, 0.25), ("zhu2020", "int8", 100, 0.25),
    ]  # fmt: skip
    train_images = load_task(values["task"]).size("train")
    assert result["rows"][0]["epochs"] == pytest.approx(3 * (16 + 16) / train_images)
    folder = tmp_path / "store" / "runs" / "s"
    assert len(json.loads((folder / "study.json").read_text())) == 4
    assert not list(folder.rglob("base.safetensors"))


def test_false_claims_study_embeds_nothing(values: dict[str, Any]) -> None:
    result = run_study(
        ReproduceSettings.of({**values, "study": "false_claims", "schemes": "uchida,new_label"})
    )
    uchida, label = result["rows"]
    assert (uchida["scheme"], uchida["accepted"], uchida["tries"], uchida["matches"]) == ("uchida", 1, 1, 256)
    assert label["method"] == "no way known"


def test_damaged_result_raises_artifact_error(values: dict[str, Any], tmp_path: Path) -> None:
    run, _ = scheme_studies.SchemeStudyRun.open(ReproduceSettings.of({**values, "study": "fig6"}))
    run.folder.write("schemes/uchida-0.json", b"{")
    with pytest.raises(ArtifactError, match=r"schemes/uchida-0.json of run 's' is damaged"):
        run.stored("uchida", 0)


@pytest.mark.parametrize("task", ["studiedtask:task", "studiedtask:task,digits"])
@pytest.mark.parametrize(
    ("study", "changes", "message"),
    [
        ("schemes", {"set": ["phase2.steps=9"]}, "set: 'phase2.steps' does not belong"),
        ("schemes", {"set": ["phase1.epochs=0"]}, "phase1.epochs: "),
        ("schemes", {"set": ["stem"]}, "set: "),
        ("schemes", {"schemes": "uchida,x"}, "schemes: Unknown scheme 'x'"),
        ("schemes", {"attacks": "int8,x"}, "attacks: Unknown attack 'x'"),
        ("new_label", {"attacks": "x"}, "attacks: Unknown attack 'x'"),
        ("property_inference", {"seeds": 1}, "seeds: Each group"),
        ("random_keys", {"set": ["stem=stock"]}, "set: This study embeds no watermark"),
        ("ablation", {"set": ["x=1"]}, "space: The space sets 'x'"),
    ],
)
def test_invalid_settings_of_study_write_nothing(
    values: dict[str, Any], tmp_path: Path, task: str, study: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run_study(ReproduceSettings.of({**values, "task": task, "study": study, "attacks": None, **changes}))
    assert not (tmp_path / "store").exists()


def test_base_is_trained_with_settings_of_the_study(values: dict[str, Any]) -> None:
    settings = ReproduceSettings.of({**values, "study": "schemes", "set": ["phase1.epochs=2"]})
    assert scheme_studies.attack_settings_of(settings, "adi", 0).training == {"phase1.epochs": "2"}
