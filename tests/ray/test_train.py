"""Tests of the embedding backend on Ray with two workers: results, files, terminal output, secrets."""

from __future__ import annotations

import base64
import json
import math
import re
import runpy
import shlex
from pathlib import Path

import pytest

from mtlsign.config import cli
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit
from tests.helpers.job_harness import ROOT, FinishedRun, JobLauncher

# The limit is for crowded machines; on two quiet cores the whole file takes about a minute.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

RESULT_FIELDS = shlex.split(
    "task model seed lambda1 lambda2 n primary_clean primary_marked wm_accuracy wm_accuracy_on_clean "
    "p_value evidence_bits deviation_l2 seconds_phase1 seconds_phase2 model_digest kit"
)
VERDICT_FIELDS = shlex.split(
    "matches n accuracy gamma p_value evidence_bits chernoff_bound accepted status model_digest"
)


def test_embedding_on_ray_is_accepted_and_keeps_task_accuracy(baseline_run: FinishedRun) -> None:
    result = baseline_run.result
    assert not set(RESULT_FIELDS) - result.keys()
    assert result["wm_accuracy"] >= 0.95 and result["accepted"] and result["p_value"] < 1e-30
    assert 0.35 < result["wm_accuracy_on_clean"] < 0.65
    assert all(0.35 < a < 0.65 for a in result["wm_accuracy_wrong_keys"])
    assert result["primary_clean"] > 0.9 and result["primary_clean"] - result["primary_marked"] < 0.02
    assert 0 < result["deviation_l2"] < 100 and result["seconds_phase1"] > 0 and result["seconds_phase2"] > 0
    assert math.isclose(math.log2(result["p_value"]), -result["evidence_bits"], rel_tol=1e-6)


def test_embedding_on_ray_writes_exactly_the_documented_files(baseline_run: FinishedRun) -> None:
    names = {
        p.relative_to(baseline_run.storage).as_posix() for p in baseline_run.storage.rglob("*") if p.is_file()
    }
    model = f"models/{baseline_run.result['model_digest']}"
    kit = Path(baseline_run.result["kit"]).relative_to(baseline_run.storage).as_posix()
    assert names == {
        *(f"{model}/{f}" for f in ("model.safetensors", "config.json", "README.md", "manifest.json")),
        *(f"{kit}/{f}" for f in ("kit.sealed", "manifest.json", "owner.json")),
        *(
            f"runs/base/{f}"
            for f in ("settings.json", "result.json", "metrics.json", "report.html", "manifest.json")
        ),
    }
    assert {p.stat().st_mode & 0o777 for p in (baseline_run.storage / "runs").rglob("*") if p.is_dir()} == {
        0o700
    }
    model_folder = read_model(str(baseline_run.storage / model))
    assert model_folder.digest == baseline_run.result["model_digest"]
    assert model_folder.config["architecture"]["width"] == 8
    history = json.loads((baseline_run.storage / "runs/base/metrics.json").read_text())
    assert [row["epoch"] for row in history["phase1"]] == [1, 2, 3, 4]
    assert [row["step"] for row in history["phase2"]] == [50, 100, 150]


def _verify(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    main = runpy.run_path(str(ROOT / "jobs" / "verify.py"))["main"]
    with pytest.raises(SystemExit) as ended:
        cli.run(main, argv)
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), out, err


def test_verify_accepts_for_this_owner_only(
    baseline_run: FinishedRun, jobs: JobLauncher, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask = ["--model", baseline_run.result["model_path"], "--kit", baseline_run.result["kit"]]
    code, out, err = _verify([*ask, *jobs.as_owner, "--json"], capsys)
    verdict = json.loads(out)
    assert code == 0 and err == "" and not set(VERDICT_FIELDS) - verdict.keys()
    assert verdict["accepted"] and verdict["status"] == "accepted"
    assert verdict["model_digest"] == baseline_run.result["model_digest"]
    assert verdict["matches"] == baseline_run.result["matches"]
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("another phrase\n")
    code, out, err = _verify([*ask, "--owner", str(jobs.owner), "--passphrase-file", str(wrong)], capsys)
    assert (code, out) == (2, "") and err.startswith("error: passphrase") and err.count("\n") == 1
    code, out, err = _verify(ask, capsys)  # another owner: the new identity's kit key does not open the kit
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_embedding_on_ray_prints_only_lines_of_the_job(baseline_run: FinishedRun) -> None:
    job_lines = "|".join(
        (
            r"owner identity .*",
            r"run base; .*: --resume base --workers 2 --storage /\S+",
            r"phase (1, task training|2, watermark) .*",
        )
    )
    lines = baseline_run.job.err.splitlines()
    assert lines and all(re.fullmatch(job_lines, line) for line in lines), baseline_run.job.err
    assert any(line.startswith("phase 2, watermark 100%") for line in lines)
    assert not [p for line in lines for p in re.findall(r"(\d+)%", line) if int(p) > 100]
    out = baseline_run.job.out.splitlines()
    assert (
        out[0].startswith("Accepted: ") and out[-1] == f"result: {baseline_run.storage}/runs/base/result.json"
    )
    assert all(line.startswith("  ") for line in out[1:-1])


def test_embedding_on_ray_leaks_no_secret_to_logs_storage_or_output(
    baseline_run: FinishedRun, jobs: JobLauncher
) -> None:
    opening = read_kit(
        baseline_run.result["kit"], EncryptionSecret.from_kit_key(jobs.identity.kit_key)
    ).opening
    secrets = {"key": opening.key(), "signature": opening.signature, "kit key": jobs.identity.kit_key}
    secrets["nonce"] = bytes.fromhex(json.loads(opening.spec)["nonce"])
    secrets["seed"] = jobs.identity._seed
    forms = {
        (name, form)
        for name, raw in secrets.items()
        for form in (raw, raw.hex().encode(), base64.b64encode(raw))
    }
    forms |= {("spec", opening.spec), ("passphrase", jobs.passphrase)}
    forms |= {("array", ", ".join(str(b) for b in raw[:8]).encode()) for raw in secrets.values()}
    places = [p for p in baseline_run.storage.rglob("*") if p.is_file() and p.suffix != ".sealed"]
    logs = [p for p in jobs.ray.rglob("*") if p.is_file() and "logs" in p.parts]
    assert any("RayTrainWorker" in p.read_text(errors="replace") for p in logs), (
        "Ray's logs are not in the expected folder"
    )
    for place in [*places, *logs, baseline_run.job.stdout, baseline_run.job.stderr]:
        data = place.read_bytes()
        assert not [name for name, form in forms if form in data], place
