"""Tests of run folders: one name, settings that a resumption may not change, no leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.sweep import SweepSettings
from mtlsign.errors import ArtifactError, SettingsError, StorageError
from mtlsign.storage.run_folder import RunFolder

LEFTOVER = "state/part.bin"


class ExampleRun(RunFolder[EmbedSettings]):
    """Run folder with one leftover file."""

    settings_class = EmbedSettings
    kind = "an example"

    def keeps_leftovers(self, settings: EmbedSettings) -> bool:
        return settings.keep_checkpoints

    def delete_leftovers(self) -> None:
        self.folder.delete("state")


def settings(folder: str, **changes: Any) -> EmbedSettings:
    return EmbedSettings.of({"storage": folder, **changes})


def reserved_run(folder: str, **changes: Any) -> tuple[ExampleRun, EmbedSettings]:
    run, complete = ExampleRun.open(settings(folder, **changes))
    run.reserve_name(complete)
    return run, complete


def test_open_new_run_writes_nothing(store_dir: str) -> None:
    run, complete = ExampleRun.open(settings(store_dir, run="a"))
    assert list(Path(store_dir).rglob("*")) == []
    assert complete == settings(store_dir, run="a") and run.name == "a"


def test_open_without_name_gives_unique_names(store_dir: str) -> None:
    assert len({ExampleRun.open(settings(store_dir))[0].name for _ in range(5)}) == 5


def test_reserve_name_of_taken_name_raises(store_dir: str) -> None:
    run, complete = ExampleRun.open(settings(store_dir, run="a"))
    racing_run, same = ExampleRun.open(settings(store_dir, run="a"))
    run.reserve_name(complete)
    with pytest.raises(SettingsError, match=r"^run: Run 'a' exists\. .*--resume a\.$"):
        racing_run.reserve_name(same)
    with pytest.raises(SettingsError, match=r"^run: Run 'a' exists"):
        ExampleRun.open(settings(store_dir, run="a"))
    assert {p.name for p in (Path(store_dir) / "runs" / "a").iterdir()} == {"settings.json"}


def test_resume_of_unknown_run_raises(store_dir: str) -> None:
    with pytest.raises(SettingsError, match=r"^resume: There is no run 'b'"):
        ExampleRun.open(settings(store_dir, resume="b"))


def test_resume_keeps_stored_settings_and_changes_resumable_ones(store_dir: str) -> None:
    reserved_run(store_dir, run="a", lambda1=0.5, workers=1, **{"phase2.steps": 30})
    run, resumed = ExampleRun.open(settings(store_dir, resume="a", workers=3, json=True, lambda1=0.5))
    assert (resumed.lambda1, resumed.phase2.steps) == (0.5, 30)
    assert (resumed.workers, resumed.json_output, resumed.resume) == (3, True, "a")
    run.reserve_name(resumed)  # a resumed run has its name already


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("lambda1", 0.6, "0.5"),
        ("seed", 3, "0"),
        ("phase2.steps", 7, "30"),
        ("phase2.other_layers_lr_scale", 0.1, "0.3"),
        ("perturbation.kinds", "noise", "pruned"),
    ],
)
def test_resume_with_changed_result_setting_names_flag_and_stored_value(
    store_dir: str, name: str, value: object, stored: str
) -> None:
    reserved_run(store_dir, run="a", lambda1=0.5, **{"phase2.steps": 30, "perturbation.kinds": "pruned"})
    with pytest.raises(SettingsError) as caught:
        ExampleRun.open(settings(store_dir, resume="a", **{name: value}))
    assert caught.value.field == name.replace("_", "-")
    assert stored in caught.value.detail and "Omit the flag or start a new run." in caught.value.detail


@pytest.mark.parametrize(
    "content", [b"{", b"7", b"\xff", b'{"stepz": 3}', b'{"space": "smoke"}', b" " * 2**21]
)
def test_resume_of_damaged_or_other_settings_raises(store_dir: str, content: bytes) -> None:
    run, _ = reserved_run(store_dir, run="a")
    run.folder.write("settings.json", content)
    with pytest.raises(
        ArtifactError, match=r"^resume: settings.json of run 'a' is damaged or not that of an"
    ):
        ExampleRun.open(settings(store_dir, resume="a"))


def test_resume_of_another_kind_of_run_raises(store_dir: str) -> None:
    run, _ = reserved_run(store_dir, run="a")
    sweep = SweepSettings.of({"space": "smoke"}).model_dump(mode="json", by_alias=True)
    run.folder.write("settings.json", json.dumps(sweep).encode())
    with pytest.raises(ArtifactError, match="Pass the name of an example"):
        ExampleRun.open(settings(store_dir, resume="a"))


@pytest.mark.parametrize("keep", [False, True])
def test_commit_writes_manifest_and_deletes_leftovers_unless_kept(store_dir: str, keep: bool) -> None:
    run, complete = reserved_run(store_dir, run="a", keep_checkpoints=keep)
    run.folder.write(LEFTOVER, b"secret")
    run.commit({"result.json": b"{}"}, complete)
    names = {"settings.json", "result.json", "manifest.json"} | ({LEFTOVER} if keep else set())
    assert set(run.folder.list()) == names
    assert run.location("result.json") == str(Path(store_dir) / "runs/a/result.json")
    with pytest.raises(SettingsError, match="exists"):
        ExampleRun.open(settings(store_dir, run="a"))


@pytest.mark.parametrize("keep", [False, True])
def test_resuming_finished_run_deletes_leftovers_unless_kept(store_dir: str, keep: bool) -> None:
    run, complete = reserved_run(store_dir, run="a", keep_checkpoints=keep)
    run.commit({"result.json": b"{}"}, complete)
    run.folder.write(LEFTOVER, b"secret")  # as after a crash between the manifest and the deletion
    with pytest.raises(SettingsError, match=r"^resume: Run 'a' is finished\. Its result is in "):
        ExampleRun.open(settings(store_dir, resume="a"))
    assert run.folder.exists(LEFTOVER) == keep and run.folder.exists("result.json")


def test_resuming_finished_run_of_another_kind_deletes_nothing(store_dir: str) -> None:
    run, complete = reserved_run(store_dir, run="a")
    run.commit({"result.json": b"{}"}, complete)
    run.folder.write(LEFTOVER, b"secret")
    run.folder.write("settings.json", b'{"stepz": 3}')
    with pytest.raises(SettingsError, match="finished"):
        ExampleRun.open(settings(store_dir, resume="a"))
    assert run.folder.exists(LEFTOVER)


def test_open_unwritable_storage_raises_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        ExampleRun.open(settings(str(tmp_path / "file" / "store")))
