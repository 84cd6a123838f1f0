"""Tests of whole studies in this process: results, resumption, refused settings."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.base import dump
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.reproduce import ReproduceSettings
from mtlsign.errors import ArtifactError, MTLSignError, SettingsError
from mtlsign.experiments.paper_studies import random_keys, run
from mtlsign.storage.locations import open_storage
from mtlsign.tasks import Task

TINY = [
    *("width=8", "key_size=128", "phase1.epochs=1", "phase1.batch=16", "phase2.steps=4"),
    *("phase2.batch=16", "perturbation.inner_steps=1"),
]


def study(name: str, **values: Any) -> ReproduceSettings:
    return ReproduceSettings.of({"study": name, **values})


@pytest.fixture
def _tiny_task(monkeypatch: pytest.MonkeyPatch, tiny_task: Task) -> None:
    for module in (
        "experiments.attack_runs.target",
        "experiments.paper_studies.random_keys",
        "experiments.sweeps.backend",
        "experiments.sweeps.cell",
        "watermark.embedding.pipeline",
    ):
        monkeypatch.setattr(f"mtlsign.{module}.load_task", lambda *_, **__: tiny_task)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("_tiny_task")
def test_run_study_writes_table(tmp_path: Path) -> None:
    result = run.run_study(
        study("overwriting", seeds=1, epochs="1", set=TINY, storage=str(tmp_path), run="o", workers=0)
    )
    table = list(csv.DictReader(io.StringIO((tmp_path / "runs/o/study.csv").read_text())))
    assert {(row["owner's head"], row["adversary's head"]) for row in table} == {
        (a, b) for a in ("free", "keyed") for b in ("free", "keyed")
    }
    assert result["text"] in (tmp_path / "runs/o/study.md").read_text()
    assert (tmp_path / "runs/o/trials.csv").exists()


@pytest.mark.usefixtures("_tiny_task")
def test_run_study_is_resumed_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"storage": str(tmp_path), "workers": 0}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mtlsign.experiments.sweeps.backend.LocalSweepBackend.run_cells", _interrupt)
        run.run_study(study("attacks", **common, heads="keyed", seeds=1, attacks="int8", set=TINY, run="a"))
    for name, changes, field in (
        ("perturbation_ablation", {}, "space"), ("attacks", {"seeds": 2}, "num-samples"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=field):
            run.run_study(study(name, **common, **changes, resume="a"))
    result = run.run_study(study("attacks", **common, resume="a"))
    assert [(row["R_DA"], row["attack"], row["n"]) for row in result["rows"]] == [
        (kinds, attack, 1)
        for kinds in ("noise,pruned,decorrelated,spoiled", "none")
        for attack in ("none", "int8")
    ]


@pytest.mark.usefixtures("_tiny_task")
def test_resumed_study_has_the_heads_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"storage": str(tmp_path), "workers": 0}
    options = {"heads": "paper,spread", "seeds": 1, "epochs": "2", "set": TINY, "run": "a"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mtlsign.experiments.sweeps.backend.LocalSweepBackend.run_cells", _interrupt)
        run.run_study(study("overwriting", **common, **options))
    with pytest.raises(SettingsError, match="space"):
        run.run_study(study("ablation", **common, resume="a"))
    result = run.run_study(study("overwriting", **common, resume="a"))
    assert [row["owner's head"] for row in result["rows"]] == ["paper", "spread"]


@property  # type: ignore[misc]
def _short_training(cell: Any) -> EmbedSettings:
    changes = {"phase1.epochs": 1, "phase1.batch": 16, "workers": 0}
    return EmbedSettings.of({**cell.config, **changes}).with_defaults()


@pytest.mark.usefixtures("_tiny_task")
def test_random_keys_resumed_after_interruption_measure_all_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = study("random_keys", width=8, keys=12, seeds=2, heads="keyed", storage=str(tmp_path), run="t")
    monkeypatch.setattr(random_keys, "_KEYS_PER_CHECKPOINT", 10)
    original, resumed_at = random_keys.random_key_accuracies, list[int]()

    def interrupted_once(*args: Any, **options: Any) -> list[float]:
        resumed_at.append(len(options["accuracies"]))
        if len(resumed_at) == 1:
            store = options["on_checkpoint"]

            def store_and_interrupt(accuracies: list[float]) -> None:
                store(accuracies)
                raise KeyboardInterrupt

            options["on_checkpoint"] = store_and_interrupt
        return original(*args, **options)

    monkeypatch.setattr(random_keys, "random_key_accuracies", interrupted_once)
    monkeypatch.setattr("mtlsign.experiments.sweeps.space.Cell.settings", _short_training)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(settings)
    result = run.run_study(study("random_keys", storage=str(tmp_path), resume="t"))
    assert resumed_at == [0, 10, 0] and result["rows"][0]["keys"] == 24
    stored = [(tmp_path / f"runs/t/keyed-{seed}-accuracies.json").read_text() for seed in (0, 1)]
    assert stored[0] != stored[1], "each seed has another W0 and other keys"
    assert 0.4 < result["rows"][0]["mean"] < 0.6
    assert not (tmp_path / "runs/t/clean").exists()
    with pytest.raises(SettingsError, match="finished"):
        run.run_study(study("random_keys", storage=str(tmp_path), resume="t"))


@pytest.mark.parametrize("name", ["random_keys", "attacks", "perturbation_ablation"])
def test_preset_paper_is_refused_by_studies_of_other_heads(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="heads: Only ablation and overwriting"):
        run.run_study(study(name, heads="paper", storage=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_random_keys_with_overrides_raises_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set: This study embeds no watermark"):
        run.run_study(study("random_keys", set=["phase2.steps=3"], storage=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_random_keys_resume_with_changed_setting_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = study("random_keys", keys=120, seed=4, heads="keyed", storage=str(tmp_path), run="t")
    open_storage(str(tmp_path)).child("runs/t").write("settings.json", dump(stored))
    for changes, message in (
        ({"keys": 130}, "keys: Run 't' has the value 120"),
        ({"seed": 5}, "seed: Run 't' has the value 4"),
        ({"heads": "free"}, "heads"),
        ({"width": 8}, "width"),
        ({"study": "ablation"}, "not that of a sweep"),
    ):
        with pytest.raises(MTLSignError, match=message):
            run.run_study(
                ReproduceSettings.of(
                    {"study": "random_keys", "storage": str(tmp_path), "resume": "t", **changes}
                )
            )
    trained: list[EmbedSettings] = []

    def train(cell: Any, _: Any) -> bytes:
        trained.append(cell.settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_shared_clean_model", train)
    with pytest.raises(KeyboardInterrupt):
        run.run_study(
            study("random_keys", storage=str(tmp_path), resume="t", keys=120, data=tmp_path, quiet=True)
        )
    assert trained[0].seed == 4 and trained[0].data == tmp_path


@pytest.mark.parametrize("data", [b"", b"[0.5", b"{}", b'["a"]', b"\xff", b"[NaN]"])
def test_random_keys_resumed_with_damaged_accuracies_names_file(data: bytes, tmp_path: Path) -> None:
    opened, settings = run.StudyRun.open(study("random_keys", storage=str(tmp_path), run="t"))
    opened.reserve_name(settings)
    opened.save_accuracies("keyed", 0, [0.5, 1.0])
    assert opened.load_accuracies("keyed", 0) == [0.5, 1.0]
    opened.folder.write("keyed-0-accuracies.json", data)
    with pytest.raises(ArtifactError, match=r"keyed-0-accuracies\.json of run 't' is damaged\. Delete it"):
        opened.load_accuracies("keyed", 0)
