"""A run's folder: one name, one science, nothing secret in the clear, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError, KeyMaterialError, SettingsError, StorageError
from mtlsign.watermark.embedding.run_folder import RESUMABLE_SETTINGS, EmbeddingRun, load_state, state_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret

SECRET = EncryptionSecret.from_kit_key(bytes(32))


def settings(folder: str, **changes: Any) -> EmbedSettings:
    return EmbedSettings.of({"storage": folder, **changes})


def begun(folder: str, **changes: Any) -> EmbeddingRun:
    run, s = EmbeddingRun.open(settings(folder, **changes))
    run.begin(s)
    return run


def test_opening_writes_nothing_and_beginning_takes_the_name(folder: str) -> None:
    run, s = EmbeddingRun.open(settings(folder, run="a"))
    assert [p for p in Path(folder).rglob("*") if p.is_file()] == []
    assert s == settings(folder, run="a").resolved() and run.name == "a"
    other, same = EmbeddingRun.open(settings(folder, run="a"))
    run.begin(s)
    with pytest.raises(SettingsError, match=r"^run: 'a' exists; .*--resume a"):
        other.begin(same)
    with pytest.raises(SettingsError, match=r"^run: 'a' exists"):
        EmbeddingRun.open(settings(folder, run="a"))
    assert {p.name for p in (Path(folder) / "runs" / "a").iterdir()} == {"settings.json"}


def test_names_are_unique_by_default(folder: str) -> None:
    assert len({EmbeddingRun.open(settings(folder))[0].name for _ in range(5)}) == 5


def test_resuming_keeps_the_science_and_changes_the_place(folder: str) -> None:
    begun(folder, run="a", lambda1=0.5, task="fashion-mnist")
    _, s = EmbeddingRun.open(settings(folder, resume="a", workers=3, json=True, lambda1=0.5))
    assert (s.lambda1, s.task, s.workers, s.json_output, s.resume, s.run) == (
        0.5,
        "fashion-mnist",
        3,
        True,
        "a",
        "a",
    )
    assert s.epochs == 10
    for name, value in {
        "lambda1": 0.6,
        "task": "digits",
        "steps": 7,
        "seed": 3,
        "insecure_test_key": True,
    }.items():
        with pytest.raises(SettingsError, match="leave it out, or start a new run") as caught:
            EmbeddingRun.open(settings(folder, resume="a", **{name: value}))
        assert caught.value.field == name.replace("_", "-")


def test_every_setting_is_either_science_or_named_as_changeable() -> None:
    assert set(EmbedSettings.model_fields) >= RESUMABLE_SETTINGS
    science = {
        "task",
        "model",
        "lambda1",
        "lambda2",
        "seed",
        "key_size",
        "head",
        "init",
        "name",
        "insecure_test_key",
    }
    assert not science & RESUMABLE_SETTINGS


def test_unknown_and_finished_and_damaged_runs(folder: str) -> None:
    with pytest.raises(SettingsError, match=r"^resume: no run 'b'"):
        EmbeddingRun.open(settings(folder, resume="b"))
    run = begun(folder, run="a")
    run.keep_checkpoint("clean", {"history": []})
    run.keep_clean({"w": torch.zeros(2)}, [])
    run.finish({"x": 1}, {"rows": []}, "<html>", keep=False)
    assert {p.name for p in (Path(folder) / "runs" / "a").iterdir()} == {
        "settings.json", "result.json", "metrics.json", "report.html", "manifest.json",
    }  # fmt: skip
    with pytest.raises(SettingsError, match=r"^resume: run 'a' is finished; its result lies in"):
        EmbeddingRun.open(settings(folder, resume="a"))
    with pytest.raises(SettingsError, match="exists"):
        EmbeddingRun.open(settings(folder, run="a"))
    broken = begun(folder, run="c")
    for content in (b"{", b"7", b"\xff"):
        broken.folder.write("settings.json", content)
        with pytest.raises(ArtifactError, match="damaged"):
            EmbeddingRun.open(settings(folder, resume="c"))


def test_checkpoints_can_be_kept(folder: str) -> None:
    run = begun(folder, run="a")
    run.keep_checkpoint("clean", {"history": []})
    run.keep_clean({"w": torch.zeros(2)}, [])
    run.finish({"x": 1}, {}, "", keep=True)
    assert run.checkpoint("clean") == {"history": []} and run.clean() is not None


def test_what_each_phase_leaves(folder: str, marked: tuple[Any, Any]) -> None:
    run = begun(folder, run="a")
    assert run.clean() is None and run.commitment(SECRET) is None and run.checkpoint("mark") is None
    base_weights, rows = {"w": torch.randn(3), "n": torch.tensor(7)}, [{"epoch": 1, "loss": 0.1}]
    run.keep_clean(base_weights, rows)
    found = run.clean()
    assert (
        found is not None
        and found[1] == rows
        and all(torch.equal(base_weights[n], t) for n, t in found[0].items())
    )
    kit = marked[1].kit
    run.keep_commitment(kit.opening, kit.reference, SECRET)
    assert run.commitment(SECRET) == (kit.opening, kit.reference)
    stored = (Path(folder) / "runs" / "a" / "commitment.sealed").read_bytes()
    assert kit.opening.spec not in stored and b"nonce" not in stored[200:]
    with pytest.raises(KeyMaterialError, match=r"^owner: is not the one that began this run"):
        run.commitment(EncryptionSecret.from_kit_key(Identity.generate().kit_key))


def test_settings_on_disk_hold_no_secret(folder: str, tmp_path: Path) -> None:
    passphrase = tmp_path / "p"
    passphrase.write_text("correct horse")
    begun(folder, run="a", passphrase_file=passphrase, owner=tmp_path / "o")
    kept = (Path(folder) / "runs" / "a" / "settings.json").read_text()
    assert "correct horse" not in kept and json.loads(kept)["passphrase_file"] == str(passphrase)


def test_states_are_tensors_and_plain_containers_only(folder: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], foreach=False)
    parameter.sum().backward()
    optimizer.step()
    state = {
        "model": {"w": torch.randn(2)},
        "optimizer": optimizer.state_dict(),
        "history": [{"a": 0.5}],
        "head": [],
    }
    again = load_state(state_bytes(state))
    assert torch.equal(again["model"]["w"], state["model"]["w"]) and again["history"] == state["history"]  # type: ignore[index]

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (os.path.join(folder, "executed"),)

    run = begun(folder, run="a")
    for data in (
        pickle.dumps(Evil()),
        state_bytes({"a": Evil()}),
        b"",
        b"PK\x03\x04",
        state_bytes(state)[:-40],
    ):
        run.folder.write("plain/mark.pt", data)
        with pytest.raises(ArtifactError, match=r"^resume: a checkpoint of this run is damaged"):
            run.checkpoint("mark")
    assert not (Path(folder) / "executed").exists()
    with pytest.raises(ArtifactError):
        load_state(state_bytes(torch.zeros(2)))  # type: ignore[arg-type]


def test_an_unwritable_place_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        EmbeddingRun.open(settings(str(tmp_path / "file" / "store")))


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_crash_left_of_a_finished_run_goes_when_somebody_resumes_it(folder: str, keep: bool) -> None:
    run = begun(folder, run="a", keep_checkpoints=keep)
    run.keep_checkpoint("mark", {"model": {}})
    run.finish({}, {}, "page", keep=True)  # as if the deletion had not happened any more
    with pytest.raises(SettingsError, match="finished"):
        EmbeddingRun.open(settings(folder, resume="a"))
    assert (Path(folder) / "runs/a/plain/mark.pt").exists() == keep
    assert (Path(folder) / "runs/a/result.json").exists()
