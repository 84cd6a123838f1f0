"""Tests of `--resume` with partly deleted or damaged run folders: a refusal, or the uninterrupted result."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import MTLSignError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding import phase2, pipeline
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.embedding.run_folder import load_state, state_bytes
from mtlsign.watermark.keys.identity import Identity

FACTORY = """
import torch
from mtlsign.tasks import from_tensors
def task(seed):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 4
    return from_tensors(torch.rand(64, 1, 24, 24, generator=g) + y[:, None, None, None], y, seed=seed)
"""
SETTINGS: dict[str, Any] = {
    "task": "damagedtask:task", "width": 4, "head": "keyed", "key_size": 128, "lambda2": 0,
    "phase1.epochs": 1, "phase1.batch": 16, "phase1.lr": 0.02, "phase2.batch": 16, "phase2.steps": 4,
    "insecure_test_key": True, "workers": 0,
}  # fmt: skip


OTHER_STATE = state_bytes({"w": torch.zeros(2)})


class SimulatedKill(BaseException):
    pass


def embed(folder: Path, on_progress: Any = None, **changes: Any) -> EmbeddingResult:
    values = {"storage": str(folder / "store"), "owner": folder / "owner.json", **SETTINGS, **changes}
    backend = pipeline.LocalEmbeddingBackend(on_progress)
    with open(folder / "log", "a") as file:
        return pipeline.run_embedding_job(
            EmbedSettings.of(values), backend, log=lambda line: print(line, file=file)
        )


def kill_in_phase2(row: dict[str, Any]) -> None:
    if row["phase"] == "mark" and row.get("step", 0) >= 4:
        raise SimulatedKill


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Return a folder with the interrupted runs `r` and `other`, the finished `done`, and its digest."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "damagedtask.py").write_text(FACTORY)
    Identity.generate().save(folder / "owner.json", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(phase2, "CHECKPOINT_STEPS", 2)
        patch.setattr(EmbeddingResult, "report", lambda _: "page")
        digest = str(embed(folder, run="done").result["model_digest"])
        for name, changes in (("r", {}), ("other", {"seed": 1})):
            with pytest.raises(SimulatedKill):
                embed(folder, kill_in_phase2, run=name, **changes)
        yield folder, digest


@pytest.fixture
def damaged(runs: tuple[Path, str], tmp_path: Path) -> Path:
    """Return a copy of the folder, whose runs a test damages."""
    shutil.copytree(runs[0], tmp_path / "copy")
    return tmp_path / "copy"


def run_folder(folder: Path, name: str = "r") -> Path:
    return folder / "store" / "runs" / name


def delete(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (run_folder(folder) / name).unlink()

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = run_folder(folder) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (run_folder(folder) / name).write_bytes(data)

    return damage


def take(*names: str) -> Callable[[Path], None]:
    """Replace files by those of the run `other`."""

    def damage(folder: Path) -> None:
        for name in names:
            shutil.copyfile(run_folder(folder, "other") / name, run_folder(folder) / name)

    return damage


def change_settings(folder: Path) -> None:
    path = run_folder(folder) / "settings.json"
    settings = json.loads(path.read_text())
    settings["phase2"]["steps"] = 40
    path.write_text(json.dumps(settings))


def change_base_weights(folder: Path) -> None:
    path = run_folder(folder) / "phase1.safetensors"
    tensors = parse_safetensors(path.read_bytes())
    tensors["conv1.weight"] += 1
    path.write_bytes(serialize_safetensors(tensors))


def lose_identity_of_checkpoint(folder: Path) -> None:
    path = run_folder(folder) / "checkpoints/mark.pt"
    state = load_state(path.read_bytes())
    del state["belongs_to"]
    path.write_bytes(state_bytes(state))


def lose_manifest_of_finished_run(folder: Path) -> None:
    shutil.rmtree(run_folder(folder))
    shutil.copytree(run_folder(folder, "done"), run_folder(folder))
    (run_folder(folder) / "manifest.json").unlink()


def replace_owner(folder: Path) -> None:
    (folder / "owner.json").unlink()
    Identity.generate().save(folder / "owner.json", None)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "settings deleted": (delete("settings.json"), "There is no run 'r'"),
    "settings truncated": (truncate("settings.json"), "settings.json of run 'r' is damaged"),
    "settings empty": (write("settings.json", b""), "settings.json of run 'r' is damaged"),
    "settings changed": (change_settings, "checkpoint of this run belongs to another key"),
    "settings of other run": (take("settings.json"), "belongs to another key or to other settings"),
    "commitment deleted": (delete("commitment.sealed"), "commitment.sealed is missing, which holds the key"),
    "commitment truncated": (truncate("commitment.sealed"), "or its commitment.sealed is damaged"),
    "commitment empty": (write("commitment.sealed", b""), "or its commitment.sealed is damaged"),
    "commitment of other run": (take("commitment.sealed"), "belongs to another W0"),
    "identity replaced": (replace_owner, "started by a different identity"),
    "checkpoint truncated": (truncate("checkpoints/mark.pt"), "checkpoint of this run is damaged"),
    "checkpoint empty": (write("checkpoints/mark.pt", b""), "checkpoint of this run is damaged"),
    "checkpoint of other run": (take("checkpoints/mark.pt"), "belongs to another key"),
    "checkpoint without identity": (lose_identity_of_checkpoint, "belongs to another key"),
    "checkpoint of other content": (write("checkpoints/mark.pt", OTHER_STATE), "belongs to another key"),
    "W0 truncated": (truncate("phase1.safetensors"), "phase1.safetensors or phase1.json is missing, damaged"),
    "W0 changed": (change_base_weights, "phase1.safetensors or phase1.json is missing, damaged"),
    "W0 of other run": (take("phase1.safetensors", "phase1.json"), "belongs to another W0"),
    "rows deleted": (delete("phase1.json"), "phase1.safetensors or phase1.json is missing, damaged"),
    "rows truncated": (truncate("phase1.json"), "phase1.safetensors or phase1.json is missing, damaged"),
    "manifest lost": (lose_manifest_of_finished_run, "manifest.json and commitment.sealed are missing"),
}  # fmt: skip
CONTINUED: dict[str, Callable[[Path], None]] = {
    "undamaged": lambda _: None,
    "checkpoint deleted": delete("checkpoints/mark.pt"),
    "W0, rows and checkpoint of phase 1 deleted": delete(
        "phase1.safetensors", "phase1.json", "checkpoints/clean.pt"
    ),
    "first checkpoint truncated, which is not needed any more": truncate("checkpoints/clean.pt"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", REFUSED)
def test_resume_of_damaged_run_is_refused_and_changes_nothing(kind: str, damaged: Path) -> None:
    damage, message = REFUSED[kind]
    damage(damaged)
    before = contents(damaged)
    with pytest.raises(MTLSignError) as caught:
        pipeline.run_embedding_job(
            EmbedSettings.of(
                {"storage": str(damaged / "store"), "owner": damaged / "owner.json", "resume": "r"}
            ),
            pipeline.LocalEmbeddingBackend(),
        )
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert contents(damaged) == before


@pytest.mark.parametrize("kind", CONTINUED)
def test_resume_of_incomplete_run_gives_result_of_uninterrupted_run(
    kind: str, damaged: Path, runs: tuple[Path, str]
) -> None:
    CONTINUED[kind](damaged)
    settings = {"storage": str(damaged / "store"), "owner": damaged / "owner.json", "resume": "r"}
    result = pipeline.run_embedding_job(EmbedSettings.of(settings), pipeline.LocalEmbeddingBackend())
    assert result.result["model_digest"] == runs[1]


def test_resume_with_checkpoint_of_phase1_of_other_settings_is_refused(damaged: Path) -> None:
    delete("phase1.safetensors", "phase1.json")(damaged)
    take("checkpoints/clean.pt")(damaged)
    settings = {"storage": str(damaged / "store"), "owner": damaged / "owner.json", "resume": "r"}
    with pytest.raises(MTLSignError, match="belongs to another key or to other settings"):
        pipeline.run_embedding_job(EmbedSettings.of(settings), pipeline.LocalEmbeddingBackend())


def test_runs_and_kits_are_private_and_short_key_is_reported_early(runs: tuple[Path, str]) -> None:
    store = runs[0] / "store"
    for folder in ("runs", "kits"):
        modes = {
            stat.S_IMODE(p.stat().st_mode)
            for p in (store / folder, *(store / folder).rglob("*"))
            if p.is_dir()
        }
        assert modes == {0o700}
        assert {stat.S_IMODE(p.stat().st_mode) for p in (store / folder).rglob("*") if p.is_file()} == {0o600}
    first = (runs[0] / "log").read_text().splitlines()[0]
    assert first.startswith("warning: A key of 128 bits reaches the 120 bits")
