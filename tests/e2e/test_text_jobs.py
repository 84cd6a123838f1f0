"""Jobs on texts with the heads that read key sequences: embed, verify, attack and a study of the paper."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job_harness import exit_code_of
from tests.unit.tasks.text.layouts import write_glove, write_sst

pytestmark = [
    pytest.mark.usefixtures("empty_figures"),
    pytest.mark.filterwarnings("ignore:.*of the official:UserWarning"),
]

QUICK = shlex.split(
    "--task sst2 --width 12 --key-size 128 --phase1.epochs 1 --phase1.batch 16 --phase2.batch 16 --workers 0 "
    "--phase2.steps 60 --phase2.lr 0.02 --lambda1 0 --insecure-test-key --seed 0 --json"
)
ATTACKS = (
    "ftal:epochs=1,prune:ratio=0.3,prune_channels:ratio=0.2,overwrite:epochs=2,images=8,spoil:steps=2,"
    "recurrent_symmetries+permute_vocabulary"
)


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of the data and storage; there are 1,100 words of SST-2's layout."""
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path / "home"))
    write_glove(tmp_path / "data", [*("the", "good", "bad"), *(f"film{i}" for i in range(1100))])
    write_sst(tmp_path / "data", (400, 40, 40))
    return ["--data", str(tmp_path / "data"), "--storage", str(tmp_path / "store")]


def run(capsys: pytest.CaptureFixture[str], name: str, *argv: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = exit_code_of(name, *argv)
    out, err = capsys.readouterr()
    assert out, err
    return code, json.loads(out)


@pytest.mark.parametrize("preset", ["paper", "keyed"])
def test_preset_marks_texts_and_survives_free_changes(
    preset: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(capsys, "embed", *QUICK, "--preset", preset, *flags)
    # A trained head alone is no evidence, so that its mark waits for a commitment.
    assert code == 0 and result["accepted"] == (preset == "keyed") and result["matches"] >= 120
    paths = ["--model", result["model_path"], "--kit", result["kit"]]
    _, verdict = run(capsys, "verify", *paths, "--min-evidence-bits", "60", "--json")
    assert verdict["matches"] == result["matches"]
    assert verdict["status"] == ("accepted" if preset == "keyed" else "needs_commitment")
    attack = ["--attacks", ATTACKS, "--workers", "0", "--min-evidence-bits", "60", "--json"]
    code, attacked = run(capsys, "attack", *paths, *attack, *flags)
    rows = {row["attack"]: row for row in attacked["rows"]}
    assert code == 0 and {row["status"] for row in rows.values()} == {"ok"}
    assert rows["recurrent_symmetries+permute_vocabulary"]["matches"] == result["matches"]
    assert rows["prune"]["matches"] >= 90


def test_study_of_texts_has_rows_of_preset_and_spread_head(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["phase1.epochs=1", "key_size=128", "phase2.steps=3", "phase2.batch=16"]
    settings = [word for pair in small for word in ("--set", pair)]
    common = shlex.split("--task sst2 --width 12 --heads paper,spread --seeds 1 --workers 0 --json")
    code, result = run(capsys, "reproduce", "overwriting", *common, *settings, "--epochs", "2/3", *flags)
    rows = result["rows"]
    assert code == 0 and {row["the paper's data"] for row in rows} == {"SST"}
    assert [(row["owner's head"], row["epochs"], row["n"]) for row in rows] == [
        (head, epochs, 1) for head in ("paper", "spread") for epochs in (2, 3)
    ]
    common[common.index("paper,spread")] = "paper"
    code, result = run(capsys, "reproduce", "ablation", *common, *settings, *flags)
    rows = result["rows"]
    assert code == 0 and [row["head"] for row in rows] == ["paper"] * 4
    assert all(row["n"] == 1 and 0 <= row["wm accuracy after FP"] <= 1 for row in rows)
