"""Tests of an embedding's run folder: state of both phases, nothing secret in the clear, nothing executed."""

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
from mtlsign.watermark.embedding.run_folder import EmbeddingRun, load_state, state_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from tests.unit.watermark.keys.examples import OPENING

SECRET = EncryptionSecret.from_kit_key(bytes(32))


def settings(folder: str, **changes: Any) -> EmbedSettings:
    return EmbedSettings.of({"storage": folder, **changes})


def reserved_run(folder: str, **changes: Any) -> tuple[EmbeddingRun, EmbedSettings]:
    run, complete = EmbeddingRun.open(settings(folder, **changes))
    run.reserve_name(complete)
    return run, complete


def test_open_new_run_completes_settings_and_writes_nothing(store_dir: str) -> None:
    run, complete = EmbeddingRun.open(settings(store_dir, run="a"))
    assert [p for p in Path(store_dir).rglob("*") if p.is_file()] == []
    assert complete == settings(store_dir, run="a").with_defaults() and run.name == "a"
    other, same = EmbeddingRun.open(settings(store_dir, run="a"))
    run.reserve_name(complete)
    with pytest.raises(SettingsError, match=r"^run: Run 'a' exists\. .*--resume a"):
        other.reserve_name(same)
    with pytest.raises(SettingsError, match=r"^run: Run 'a' exists"):
        EmbeddingRun.open(settings(store_dir, run="a"))
    assert {p.name for p in (Path(store_dir) / "runs" / "a").iterdir()} == {"settings.json"}


def test_open_without_name_gives_unique_names(store_dir: str) -> None:
    assert len({EmbeddingRun.open(settings(store_dir))[0].name for _ in range(5)}) == 5


def test_resume_keeps_result_settings_and_changes_resumable_ones(store_dir: str) -> None:
    reserved_run(store_dir, run="a", lambda1=0.5, task="fashion-mnist")
    _, resumed = EmbeddingRun.open(settings(store_dir, resume="a", workers=3, json=True, lambda1=0.5))
    assert (resumed.lambda1, resumed.task, resumed.workers) == (0.5, "fashion-mnist", 3)
    assert (resumed.json_output, resumed.resume, resumed.run) == (True, "a", "a")
    assert resumed.phase1.epochs == 10
    changed = {"lambda1": 0.6, "task": "digits", "phase2.steps": 7, "seed": 3, "insecure_test_key": True}
    for name, value in changed.items():
        with pytest.raises(SettingsError, match="Omit the flag or start a new run") as caught:
            EmbeddingRun.open(settings(store_dir, resume="a", **{name: value}))
        assert caught.value.field == name.replace("_", "-")


def test_resumable_settings_exist_and_exclude_those_of_the_result() -> None:
    # `max_concurrent` is a setting of sweeps
    assert set(EmbedSettings.model_fields) >= EmbedSettings.resumable - {"max_concurrent"}
    result_settings = {
        *("task", "model", "lambda1", "lambda2", "seed", "key_size", "head", "weights", "name"),
        *("insecure_test_key", "phase1", "phase2", "perturbation"),
    }
    assert result_settings <= set(EmbedSettings.model_fields)
    assert not result_settings & EmbedSettings.resumable


def test_resume_of_unknown_finished_or_damaged_run_raises(store_dir: str) -> None:
    with pytest.raises(SettingsError, match=r"^resume: There is no run 'b'"):
        EmbeddingRun.open(settings(store_dir, resume="b"))
    run, complete = reserved_run(store_dir, run="a")
    run.save_checkpoint("clean", {"history": []})
    run.save_clean_model({"w": torch.zeros(2)}, [])
    run.finish({"x": 1}, {"rows": []}, "<html>", complete)
    assert {p.name for p in (Path(store_dir) / "runs" / "a").iterdir()} == {
        "settings.json", "result.json", "metrics.json", "report.html", "manifest.json",
    }  # fmt: skip
    with pytest.raises(SettingsError, match=r"^resume: Run 'a' is finished\. Its result is in"):
        EmbeddingRun.open(settings(store_dir, resume="a"))
    with pytest.raises(SettingsError, match="exists"):
        EmbeddingRun.open(settings(store_dir, run="a"))
    damaged, _ = reserved_run(store_dir, run="c")
    for content in (b"{", b"7", b"\xff"):
        damaged.folder.write("settings.json", content)
        with pytest.raises(ArtifactError, match="damaged"):
            EmbeddingRun.open(settings(store_dir, resume="c"))


def test_finish_with_keep_checkpoints_keeps_state(store_dir: str) -> None:
    run, complete = reserved_run(store_dir, run="a", keep_checkpoints=True)
    run.save_checkpoint("clean", {"history": []})
    run.save_clean_model({"w": torch.zeros(2)}, [])
    run.finish({"x": 1}, {}, "", complete)
    assert run.load_checkpoint("clean") == {"history": []} and run.load_clean_model() is not None


def test_state_of_both_phases_is_returned_and_commitment_is_encrypted(
    store_dir: str, marked_model: tuple[Any, Any]
) -> None:
    run, _ = reserved_run(store_dir, run="a")
    assert run.load_clean_model() is None
    assert run.load_commitment(SECRET) is None and run.load_checkpoint("mark") is None
    base_weights, rows = {"w": torch.randn(3), "n": torch.tensor(7)}, [{"epoch": 1, "loss": 0.1}]
    run.save_clean_model(base_weights, rows)
    clean = run.load_clean_model()
    assert clean is not None and clean[1] == rows
    assert all(torch.equal(base_weights[name], tensor) for name, tensor in clean[0].items())
    kit = marked_model[1].kit
    for openings in ([kit.opening, OPENING], [kit.opening]):
        run.save_commitment(openings, kit.reference, SECRET)
        assert run.load_commitment(SECRET) == (openings, kit.reference)
    stored = (Path(store_dir) / "runs" / "a" / "commitment.sealed").read_bytes()
    assert kit.opening.spec not in stored and b"nonce" not in stored[200:]
    with pytest.raises(KeyMaterialError, match=r"^owner: This run was started by a different identity"):
        run.load_commitment(EncryptionSecret.from_kit_key(Identity.generate().kit_key))


def test_settings_file_holds_no_secret(store_dir: str, tmp_path: Path) -> None:
    passphrase = tmp_path / "p"
    passphrase.write_text("correct horse")
    reserved_run(store_dir, run="a", passphrase_file=passphrase, owner=tmp_path / "o")
    stored = (Path(store_dir) / "runs" / "a" / "settings.json").read_text()
    assert "correct horse" not in stored and json.loads(stored)["passphrase_file"] == str(passphrase)


def test_load_state_admits_only_tensors_and_plain_containers(store_dir: str) -> None:
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
    loaded = load_state(state_bytes(state))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["history"] == state["history"]  # type: ignore[index]

    class CodeExecutionProbe:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (os.path.join(store_dir, "executed"),)

    run, _ = reserved_run(store_dir, run="a")
    for data in (
        pickle.dumps(CodeExecutionProbe()),
        state_bytes({"a": CodeExecutionProbe()}),
        b"",
        b"PK\x03\x04",
        state_bytes(state)[:-40],
    ):
        run.folder.write("checkpoints/mark.pt", data)
        with pytest.raises(ArtifactError, match=r"^resume: A checkpoint of this run is damaged"):
            run.load_checkpoint("mark")
    assert not (Path(store_dir) / "executed").exists()
    with pytest.raises(ArtifactError):
        load_state(state_bytes(torch.zeros(2)))  # type: ignore[arg-type]


def test_open_unwritable_storage_raises_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        EmbeddingRun.open(settings(str(tmp_path / "file" / "store")))


@pytest.mark.parametrize("keep", [False, True])
def test_resuming_finished_run_deletes_leftover_checkpoints(store_dir: str, keep: bool) -> None:
    run, complete = reserved_run(store_dir, run="a", keep_checkpoints=keep)
    run.finish({}, {}, "page", complete)
    run.save_checkpoint("mark", {"model": {}})  # as if the process had ended before the deletion
    with pytest.raises(SettingsError, match="finished"):
        EmbeddingRun.open(settings(store_dir, resume="a"))
    assert (Path(store_dir) / "runs/a/checkpoints/mark.pt").exists() == keep
    assert (Path(store_dir) / "runs/a/result.json").exists()
