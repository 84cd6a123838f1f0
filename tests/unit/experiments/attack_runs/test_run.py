"""Tests of an attack run in this process: results, interrupted runs, refusals that write nothing."""

from __future__ import annotations

import csv
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mtlsign.config import cli
from mtlsign.config.verify import VerifySettings
from mtlsign.experiments.attack_runs import executor, results
from mtlsign.experiments.attack_runs.results import COLUMNS
from mtlsign.reports.attacks import render_attack_report
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import MODEL_FILE, read_model
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import verify_with_kit

ROOT = Path(__file__).resolve().parents[4]
NEEDED = {
    "attack", "parameters", "seed", "wm_accuracy", "evidence_bits", "accepted", "primary_before",
    "primary_after", "seconds",
}  # fmt: skip
FACTORY = """
import torch
from mtlsign.tasks import from_tensors
def task(seed):
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, 24, 24, generator=gen)[y] + 0.3 * torch.randn(120, 1, 24, 24, generator=gen)
    return from_tensors(x, y, seed=seed)
"""


class JobRunner:
    """The job with the flags that it always needs; a call returns exit code, output and errors."""

    def __init__(
        self, always: list[str], capsys: pytest.CaptureFixture[str], storage: Path, saved: Any
    ) -> None:
        self.main = runpy.run_path(str(ROOT / "jobs" / "attack.py"))["main"]
        self.always, self._capsys, self.storage, self.saved = always, capsys, storage, saved

    def __call__(self, *flags: str, main: Any = None) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(main or self.main, [*self.always, *flags])
        out, err = self._capsys.readouterr()
        return int(str(ended.value.code)), out, err

    def files(self) -> set[str]:
        return {p.relative_to(self.storage).as_posix() for p in self.storage.rglob("*") if p.is_file()}


@pytest.fixture
def job(
    marked_model: Any, tmp_path: Path, owner: Identity, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> JobRunner:  # fmt: skip
    (tmp_path / "attackedtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = tmp_path / "owner" / "identity.json"
    identity.parent.mkdir(mode=0o700)
    owner.save(identity, None)
    _, embedding = marked_model
    embedding.save(open_storage(str(tmp_path / "embedded")), EncryptionSecret.from_kit_key(owner.kit_key))
    storage = tmp_path / "store"
    always = [
        "--model", embedding.result["model_path"], "--kit", embedding.result["kit"], "--owner", str(identity),
        "--task", "attackedtask:task", "--storage", str(storage), "--workers", "0",
    ]  # fmt: skip
    return JobRunner(always, capsys, storage, embedding)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "attacks.csv").open()))


def test_run_attack_job_writes_all_results(job: JobRunner) -> None:
    attacks = (
        "ftal:epochs=1,batch=16,prune:ratio=0.5/0.99,bn_fold,transpose_input,permute_channels:which=residual,"
        "average_models,ambiguity_trained_head:steps=40,hidden=16,prune:ratio=0.3+int8"
    )
    code, out, err = job("--attacks", attacks, "--run", "one", "--seed", "5")
    assert code == 0 and re.match(r"\d+ of 9 attacks removed the watermark", out)
    assert out.splitlines()[-1] == f"result: {job.storage}/runs/one/result.json"
    assert "run one: 10 rows" in err.splitlines()[0] and "10/10" in err.splitlines()[-1]
    folder = job.storage / "runs/one"
    assert not {p for p in (folder, *folder.rglob("*")) if p.stat().st_mode & 0o077}, "private"
    rows = table(job.storage, "one")
    assert list(rows[0]) == list(COLUMNS) and set(COLUMNS) > NEEDED
    assert [r["attack"] for r in rows] == [
        "none", "ftal", "prune", "prune", "bn_fold", "transpose_input", "permute_channels", "average_models",
        "ambiguity_trained_head", "prune+int8",
    ]  # fmt: skip
    by = {f"{r['attack']} {r['parameters']}".strip(): r for r in rows}
    baseline, result = by["none"], json.loads((job.storage / "runs/one/result.json").read_text())
    assert float(baseline["wm_accuracy"]) == job.saved.verdict.accuracy and baseline["accepted"] == "true"
    assert float(baseline["primary_after"]) == pytest.approx(job.saved.result["primary_marked"])
    assert all(r["seed"] == "5" and r["primary_before"] == baseline["primary_after"] for r in rows)
    ftal = by["ftal lr=quarter epochs=1 schedule=constant batch=16"]
    assert int(ftal["steps"]) > 0 and float(ftal["seconds"]) > 0
    stream = by["permute_channels which=residual"]
    assert (stream["removed"], stream["points_lost"], stream["accepted"]) == ("false", "0.0", "true")
    assert by["transpose_input"]["inputs"] == "transposed" and by["transpose_input"]["points_lost"] == "0.0"
    assert by["bn_fold decoys=none"]["removed"] == "false"
    assert by["average_models copies=0 bn=recalibrated"]["status"] == "not_applicable"
    assert by["average_models copies=0 bn=recalibrated"]["primary_after"] == ""
    forged = by["ambiguity_trained_head steps=40 lr=0.01 hidden=16"]
    assert forged["verdict"] == "needs_commitment" and forged["removed"] == ""
    assert result["rows"][1]["attack"] == "ftal" and result["not_applicable"] == 1
    assert result["removed"] == sum(r["removed"] == "true" for r in rows)
    typed = pq.read_table(job.storage / "runs/one/attacks.parquet")
    assert typed.column_names == list(COLUMNS) and typed.num_rows == 10
    assert typed.column("accepted").to_pylist()[0] is True
    names = {name.split("/")[2] for name in job.files()}
    assert names == {
        "settings.json", "attacks.csv", "attacks.parquet", "result.json", "report.html", "manifest.json",
        "models",
    }  # fmt: skip


def test_pairs_follow_the_list_and_survive_an_interruption(
    job: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, attack_names = executor.run_attack, []

    def interrupted(target: Any, plan: Any, *rest: Any) -> Any:
        attack_names.append(plan.name)
        if sum("+" in name for name in attack_names) == 2:
            raise KeyboardInterrupt
        return original(target, plan, *rest)

    monkeypatch.setattr(executor, "run_attack", interrupted)
    attacks = ("--attacks", "prune:ratio=0.1,int8,noise:sigma=0.02,bn_fold")
    assert job(*attacks, "--pairs", "2", "--run", "p")[0] == 130
    monkeypatch.setattr(executor, "run_attack", original)
    code, _, err = job("--resume", "p")
    assert code == 0 and "7/7" in err.splitlines()[-1]
    names = [row["attack"] for row in table(job.storage, "p")]
    assert names == ["none", "prune", "int8", "noise", "bn_fold", *attack_names[-2:]]
    assert all(name.count("+") == 1 and "bn_fold" not in name for name in attack_names[-2:])


def test_stored_attacked_models_are_read_by_verifier(job: JobRunner) -> None:
    attacks = "bn_fold,permute_channels,int8,rewrite_file:form=weight_norm"
    assert job("--attacks", attacks, "--run", "two")[0] == 0
    rows = {r["attack"]: r for r in table(job.storage, "two")}
    settings = VerifySettings.of(
        {"model": [r["model"] for r in rows.values()], "kit": job.saved.result["kit"],
         "owner": job.always[5], "control_keys": 0}
    )  # fmt: skip
    for row, verdict in zip(rows.values(), verify_with_kit(settings), strict=True):
        assert (str(verdict.matches), verdict.model_digest) == (row["matches"], row["model_digest"])
        model = read_model(row["model"])
        assert model.digest == row["model_digest"] and model.config["architecture"]["width"] == 8
        assert model.config["attack"].split()[0] == row["attack"]
    folded = read_model(rows["bn_fold"]["model"]).tensors
    assert "conv1.bias" in folded and "bn1.weight" not in folded
    assert {"conv1.weight_g", "conv1.weight_v"} <= read_model(rows["rewrite_file"]["model"]).tensors.keys()
    assert job("--attacks", "int8", "--run", "three", "--no-keep-models")[0] == 0
    assert not any(name.startswith("runs/three/models") for name in job.files())


def test_interrupted_run_keeps_rows_and_is_resumed(job: JobRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    original, attack_names = executor.run_attack, []

    def interrupted(target: Any, plan: Any, *rest: Any) -> Any:
        attack_names.append(plan.name)
        if plan.name == "int4":
            raise KeyboardInterrupt
        return original(target, plan, *rest)

    def recorded(target: Any, plan: Any, *rest: Any) -> Any:
        attack_names.append(plan.name)
        return original(target, plan, *rest)

    monkeypatch.setattr(executor, "run_attack", interrupted)
    attacks = ("--attacks", "int8,noise,int4,bn_reparameterize")
    code, out, err = job(*attacks, "--run", "cut")
    assert (code, out) == (130, "") and err.splitlines()[-1].startswith("interrupted")
    rows_before = table(job.storage, "cut")
    assert [r["attack"] for r in rows_before] == ["none", "int8", "noise"]
    assert not (job.storage / "runs/cut/manifest.json").exists()
    monkeypatch.setattr(executor, "run_attack", recorded)
    attack_names.clear()
    code, _, err = job("--resume", "cut")
    assert code == 0 and "3 of them are finished already" in err
    assert attack_names == ["int4", "bn_reparameterize"]
    rows = table(job.storage, "cut")
    assert [r["attack"] for r in rows] == ["none", "int8", "noise", "int4", "bn_reparameterize"]
    assert rows[:3] == rows_before
    assert job("--run", "uninterrupted", *attacks)[0] == 0
    varying = {"seconds", "model"}
    for a, b in zip(table(job.storage, "uninterrupted"), rows, strict=True):
        assert {k: v for k, v in a.items() if k not in varying} == {
            k: v for k, v in b.items() if k not in varying
        }
    assert "finished" in job("--resume", "cut")[2]


def test_failed_or_diverged_attack_is_a_row(job: JobRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlsign.attacks import weight_noise

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug in one attack")

    monkeypatch.setattr(torch, "randn", broken)
    code, out, _ = job("--attacks", "noise,int8", "--run", "bad")
    assert code == 0 and "1 failed" in out
    rows = {r["attack"]: r for r in table(job.storage, "bad")}
    assert rows["noise"]["status"] == "failed" and "ZeroDivisionError" in rows["noise"]["reason"]
    assert rows["int8"]["status"] == "ok" and weight_noise.noise.__doc__
    monkeypatch.undo()
    code, out, _ = job("--attacks", "noise:sigma=10,ftal:lr=100,epochs=40,batch=2", "--run", "nan")
    rows = {r["attack"]: r for r in table(job.storage, "nan")}
    assert code == 0 and rows["noise"]["status"] in ("ok", "diverged")
    ftal = rows["ftal"]
    assert ftal["status"] == "diverged" or float(ftal["points_lost"]) > 20
    assert ftal["removed"] in ("", "false")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--attacks", "ftaal"), "attacks: Unknown attack 'ftaal'. Did you mean 'ftal'?"),
        (("--model", "nowhere"), "nowhere"),
        (("--kit", "nowhere"), "nowhere"),
        (("--task", "digits"), "task: The task has 10 classes, the model 4"),
        (("--other-marked-models", "nowhere"), "nowhere"),
        (("--public-base", "nowhere"), "nowhere"),
        (("--resume", "absent"), "resume: There is no run 'absent'"),
        (("--extra-data-fraction", "2"), "extra-data-fraction"),
        (("--trusted-factory", "x"), "trusted-factory"),
    ],
)
def test_invalid_input_is_refused_and_writes_nothing(
    flags: tuple[str, ...], message: str, job: JobRunner
) -> None:
    code, out, err = job("--attacks", "int8", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not job.storage.exists()


def test_task_that_is_code_is_imported_only_if_named(job: JobRunner, tmp_path: Path) -> None:
    position = job.always.index("--task")
    job.always[position : position + 2] = []
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "Pass --task" in err  # `own`: a task of a notebook has no name
    folder = Path(job.saved.result["model_path"])
    config = json.loads((folder / "config.json").read_text()) | {"task": "attackedtask:task"}
    from mtlsign.storage.model_folder import write_model

    digest = write_model(
        open_storage(str(tmp_path / "other")), read_model(str(folder)).tensors, config, "card"
    )
    job.always[1] = str(tmp_path / "other" / "models" / digest)
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "task: The task is code. If you trust it, pass --task attackedtask:task" in err


def test_resume_with_changed_setting_or_other_run_is_refused(job: JobRunner) -> None:
    (job.storage / "runs/x").mkdir(parents=True)
    job.always[:4] = []  # model and kit come from the run
    (job.storage / "runs/x/settings.json").write_text('{"seed": 3}')
    assert "seed: Run 'x' has the value 3" in job("--resume", "x", "--seed", "4")[2]
    (job.storage / "runs/x/settings.json").write_text('{"epochs": 3}')
    assert "not that of an attack run" in job("--resume", "x")[2]


def test_attacks_list_needs_no_other_setting(job: JobRunner) -> None:
    job.always.clear()
    code, out, err = job("--attacks", "list")
    assert (
        code == 0
        and err == ""
        and "ftal" in out
        and "permute_channels" in out
        and "ambiguity_trained_head" in out
    )
    catalogue = json.loads(job("--attacks", "list", "--json")[1])
    assert {"attack", "kind", "summary", "settings"} == catalogue[0].keys()
    assert "error: model: This setting is required" in job("--attacks", "int8")[2]


def test_json_flag_prints_only_json(job: JobRunner) -> None:
    code, out, err = job("--attacks", "int8", "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and [r["attack"] for r in result["rows"]] == ["none", "int8"]


class StrictHtmlParser(HTMLParser):
    """Parser that fails on unbalanced tags, on scripts and on external resources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert all(not k.startswith("on") and k != "src" for k, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.figures
def test_report_holds_every_row_and_rule(job: JobRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pruning removes this small network's watermark; the accuracy that it costs depends on the processor.
    monkeypatch.setattr(results, "MAX_POINTS_LOST", 100.0)
    assert job("--attacks", "int8,prune:ratio=0.99,average_models", "--run", "r")[0] == 0
    page = (job.storage / "runs/r/report.html").read_text()
    parser = StrictHtmlParser()
    parser.feed(page)
    assert parser.open == [] and "1 of 3 attacks removed the watermark" in parser.text
    for text in ("int8", "prune", "ratio=0.99", "not applicable", "removed: under 120 bits"):
        assert text in parser.text, text
    assert page.count("<svg") == 1 and 'role="img"' in page and len(page) < 200_000
    result = json.loads((job.storage / "runs/r/result.json").read_text())
    evil = "<script>alert(1)</script>"
    for row in result["rows"]:
        row["reason"] = row["attack"] = evil
    hostile = render_attack_report(result | {"task": evil, "model": evil})
    assert "<script" not in hostile and "&lt;script" in hostile
    empty = [row | {"points_lost": None} for row in result["rows"]]
    assert "<svg" not in render_attack_report(result | {"rows": empty})


def test_model_with_other_architecture_is_refused(job: JobRunner, tmp_path: Path) -> None:
    tensors = dict(read_model(job.always[1]).tensors)
    del tensors["bn1.weight"]
    (tmp_path / MODEL_FILE).write_bytes(serialize_safetensors(tensors))
    job.always[1] = str(tmp_path / MODEL_FILE)
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "does not have the architecture" in err and not job.storage.exists()


def test_unmarked_model_has_nothing_to_remove(job: JobRunner, marked_model: Any, tmp_path: Path) -> None:
    base_weights, _ = marked_model
    (tmp_path / MODEL_FILE).write_bytes(serialize_safetensors(base_weights))
    job.always[1] = str(
        tmp_path / MODEL_FILE
    )  # a single file: architecture and task come from the kit and the flags
    code, out, _ = job("--attacks", "int8,permute_channels", "--run", "w0")
    assert code == 0 and out.startswith("the model had fewer than 120 bits of evidence before any attack")
    assert [r["removed"] for r in table(job.storage, "w0")] == ["", "", ""]
    page = (job.storage / "runs/w0/report.html").read_text()
    assert "Nothing could be removed" in page and 'class="verdict open"' in page
