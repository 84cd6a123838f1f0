"""jobs/attack.py in one process: the whole run, interrupted runs, refusals that leave nothing behind."""

from __future__ import annotations

import csv
import json
import re
import runpy
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mtlsign.attacks import AttackPlan
from mtlsign.attacks.expressions import row_header
from mtlsign.config import cli
from mtlsign.config.verify import VerifySettings
from mtlsign.experiments.attack_runs import executor
from mtlsign.experiments.attack_runs.executor import AttackResult, plans_with_baseline, run_all
from mtlsign.experiments.attack_runs.results import COLUMNS, compare_with_baseline, summary_counts
from mtlsign.experiments.attack_runs.target import AttackTarget
from mtlsign.reports.attack_console import format_result
from mtlsign.reports.attacks import render_attack_report
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import MODEL_FILE, read_model
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import verify_with_kit

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "attack", "setting", "seed", "wm_accuracy", "evidence_bits", "accepted", "primary_before",
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


class Job:
    """The job's `main` with everything it always needs; returns exit code, output, errors."""

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
    marked: Any, tmp_path: Path, owner: Identity, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Job:  # fmt: skip
    (tmp_path / "attackedtask.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = tmp_path / "owner" / "identity.json"
    identity.parent.mkdir(mode=0o700)
    owner.save(identity, None)
    _, done = marked
    done.save(open_storage(str(tmp_path / "embedded")), EncryptionSecret.from_kit_key(owner.kit_key))
    storage = tmp_path / "store"
    always = [
        "--model", done.result["model_path"], "--kit", done.result["kit"], "--owner", str(identity),
        "--task", "attackedtask:task", "--storage", str(storage), "--workers", "0",
    ]  # fmt: skip
    return Job(always, capsys, storage, done)


def table(storage: Path, run: str) -> list[dict[str, str]]:
    return list(csv.DictReader((storage / "runs" / run / "attacks.csv").open()))


def test_a_run_from_end_to_end(job: Job) -> None:
    attacks = (
        "ftal:epochs=1,batch=16,prune:ratio=0.5/0.99,bn_fold,transpose_input,permute_channels:which=stream,"
        "average,forge_head:steps=40,hidden=16,prune:ratio=0.3+int8"
    )
    code, out, err = job("--attacks", attacks, "--run", "one", "--seed", "5")
    assert code == 0 and re.match(r"\d+ of 9 attacks removed the mark", out)
    assert out.splitlines()[-1] == f"result: {job.storage}/runs/one/result.json"
    assert "run one: 10 rows" in err.splitlines()[0] and "10/10" in err.splitlines()[-1]
    rows = table(job.storage, "one")
    assert list(rows[0]) == list(COLUMNS) and set(COLUMNS) > NEEDED
    assert [r["attack"] for r in rows] == [
        "none", "ftal", "prune", "prune", "bn_fold", "transpose_input", "permute_channels", "average",
        "forge_head", "prune+int8",
    ]  # fmt: skip
    by = {f"{r['attack']} {r['setting']}".strip(): r for r in rows}
    whole, result = by["none"], json.loads((job.storage / "runs/one/result.json").read_text())
    assert float(whole["wm_accuracy"]) == job.saved.verdict.accuracy and whole["accepted"] == "true"
    assert float(whole["primary_after"]) == pytest.approx(job.saved.result["primary_marked"])
    assert all(r["seed"] == "5" and r["primary_before"] == whole["primary_after"] for r in rows)
    ftal = by["ftal lr=quarter epochs=1 path=constant batch=16"]
    assert int(ftal["steps"]) > 0 and float(ftal["seconds"]) > 0
    stream = by["permute_channels which=stream"]
    assert (stream["removed"], stream["points_lost"], stream["accepted"]) == ("true", "0.0", "false")
    assert by["transpose_input"]["inputs"] == "transposed" and by["transpose_input"]["points_lost"] == "0.0"
    assert by["bn_fold decoys=none"]["removed"] == "false"
    assert by["average copies=0 bn=recalibrated"]["status"] == "not_applicable"
    assert by["average copies=0 bn=recalibrated"]["primary_after"] == ""
    forged = by["forge_head steps=40 lr=0.01 hidden=16"]
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


def test_attacked_models_are_read_by_the_verifier(job: Job) -> None:
    assert job("--attacks", "bn_fold,permute_channels,int8", "--run", "two")[0] == 0
    rows = {r["attack"]: r for r in table(job.storage, "two")}
    settings = VerifySettings.of(
        {"model": ",".join(r["model"] for r in rows.values()), "kit": job.saved.result["kit"],
         "owner": job.always[5], "controls": 0}
    )  # fmt: skip
    for row, verdict in zip(rows.values(), verify_with_kit(settings), strict=True):
        assert (str(verdict.matches), verdict.model_digest) == (row["matches"], row["model_digest"])
        found = read_model(row["model"])
        assert found.digest == row["model_digest"] and found.config["graph"]["width"] == 8
        assert found.config["attack"].split()[0] == row["attack"]
    folded = read_model(rows["bn_fold"]["model"]).tensors
    assert "conv1.bias" in folded and "bn1.weight" not in folded
    assert job("--attacks", "int8", "--run", "three", "--no-keep-models")[0] == 0
    assert not any(name.startswith("runs/three/models") for name in job.files())


def test_an_interrupted_run_keeps_its_rows_and_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:

    strike, seen = executor.run_attack, []

    def interrupted(target: Any, order: Any, *rest: Any) -> Any:
        seen.append(order.name)
        if order.name == "int4":
            raise KeyboardInterrupt
        return strike(target, order, *rest)

    monkeypatch.setattr(executor, "run_attack", interrupted)
    attacks = ("--attacks", "int8,noise,int4,bn_gauge")
    code, out, err = job(*attacks, "--run", "cut")
    assert (code, out) == (130, "") and err.splitlines()[-1].startswith("interrupted")
    kept = table(job.storage, "cut")
    assert [r["attack"] for r in kept] == ["none", "int8", "noise"]
    assert not (job.storage / "runs/cut/manifest.json").exists()
    monkeypatch.setattr(
        executor, "run_attack", lambda t, o, *rest: seen.append(o.name) or strike(t, o, *rest)
    )
    seen.clear()
    code, _, err = job("--resume", "cut")
    assert code == 0 and seen == ["int4", "bn_gauge"] and "3 of them are done already" in err
    rows = table(job.storage, "cut")
    assert [r["attack"] for r in rows] == ["none", "int8", "noise", "int4", "bn_gauge"] and rows[:3] == kept
    whole = job("--run", "whole", *attacks)
    assert whole[0] == 0
    drop = {"seconds", "model"}
    for a, b in zip(table(job.storage, "whole"), rows, strict=True):
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}
    assert "finished" in job("--resume", "cut")[2]


def test_what_fails_or_diverges_is_a_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlsign.attacks import weight_noise

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a defect of one attack")

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
    ("flags", "told"),
    [
        (("--attacks", "ftaal"), "attacks: unknown attack 'ftaal'; did you mean 'ftal'?"),
        (("--model", "nowhere"), "nowhere"),
        (("--kit", "nowhere"), "nowhere"),
        (("--task", "digits"), "task: has 10 classes, the model 4"),
        (("--copies", "nowhere"), "nowhere"),
        (("--resume", "absent"), "resume: no run 'absent'"),
        (("--budget", "2"), "budget"),
        (("--factory", "x"), "factory"),
    ],
)
def test_refusals_write_nothing(flags: tuple[str, ...], told: str, job: Job) -> None:
    code, out, err = job("--attacks", "int8", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and told in err
    assert not job.storage.exists()


def test_a_models_own_task_is_not_imported_unasked(job: Job, tmp_path: Path) -> None:
    position = job.always.index("--task")
    job.always[position : position + 2] = []
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "give --task" in err  # `own`: a notebook's task has no name
    place = Path(job.saved.result["model_path"])
    config = json.loads((place / "config.json").read_text()) | {"task": "attackedtask:task"}
    from mtlsign.storage.model_folder import write_model

    digest = write_model(
        open_storage(str(tmp_path / "other")), read_model(str(place)).tensors, config, "card"
    )
    job.always[1] = str(tmp_path / "other" / "models" / digest)
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "task: is code; if you trust it: --task attackedtask:task" in err


def test_resume_does_not_change_what_is_attacked(job: Job) -> None:
    (job.storage / "runs/x").mkdir(parents=True)
    job.always[:4] = []  # model and kit come from the run
    (job.storage / "runs/x/settings.json").write_text('{"seed": 3}')
    assert "seed: is 3 in run 'x'" in job("--resume", "x", "--seed", "4")[2]
    (job.storage / "runs/x/settings.json").write_text('{"epochs": 3}')
    assert "is no attack run's" in job("--resume", "x")[2]


def test_the_list_needs_nothing(job: Job) -> None:
    job.always.clear()
    code, out, err = job("--attacks", "list")
    assert code == 0 and err == "" and "ftal" in out and "permute_channels" in out and "forge_head" in out
    found = json.loads(job("--attacks", "list", "--json")[1])
    assert {"attack", "kind", "summary", "settings"} == found[0].keys()
    assert "error: model: is required" in job("--attacks", "int8")[2]


def test_json_is_the_only_output(job: Job) -> None:
    code, out, err = job("--attacks", "int8", "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and [r["attack"] for r in result["rows"]] == ["none", "int8"]


def test_the_fields_rule() -> None:
    def removed(kind: str, verdict: str, bits: float, after: float) -> Any:
        row = dict.fromkeys(COLUMNS) | {
            "kind": kind, "verdict": verdict, "evidence_bits": bits, "primary_after": after,
        }  # fmt: skip
        return compare_with_baseline(row, whole, 120.0)["removed"]

    whole: dict[str, Any] = {"primary_after": 0.9, "evidence_bits": 500.0}
    assert removed("removal", "rejected", 119.9, 0.85) is True
    assert removed("removal", "rejected", 119.9, 0.849) is False  # it paid more than 5 points
    assert removed("removal", "accepted", 120.0, 0.9) is False
    assert removed("free", "needs_commitment", 40, 0.9) is True
    assert removed("free", "not_verifiable", 0, 0.9) is None
    assert removed("forgery", "rejected", 0, 0.9) is None
    whole["evidence_bits"] = 119.0  # there was nothing to remove
    assert removed("removal", "rejected", 100.0, 0.9) is None
    assert plans_with_baseline("int8,none")[0].name == "none" and len(plans_with_baseline("int8,none")) == 2


def test_rows_of_an_interrupted_run_are_compared_with_the_later_whole() -> None:
    """`none` may fail at first: then the rows kept beside it knew nothing to compare themselves with."""

    class Crew:
        def check(self, target: AttackTarget) -> None:
            """Nothing to look at."""

        def run_attacks(
            self, target: AttackTarget, orders: Sequence[AttackPlan], seed: int
        ) -> Iterator[tuple[AttackPlan, AttackResult]]:
            for order in orders:
                failed = order.name == "none" and seed == 1
                found = {"status": "failed"} if failed else numbers[order.name] | {"status": "ok"}
                yield order, AttackResult(dict.fromkeys(COLUMNS) | row_header(order) | found, None)

    numbers: dict[str, Any] = {
        "none": {"primary_after": 0.9, "evidence_bits": 500.0, "verdict": "accepted"},
        "int8": {"primary_after": 0.88, "evidence_bits": 3.0, "verdict": "rejected"},
    }
    target: Any = SimpleNamespace(bits=120.0)
    orders = plans_with_baseline("int8")
    first = run_all(target, orders, 1, Crew(), keep=lambda row, _: row)
    assert first[1]["removed"] is None and summary_counts(first)["marked"] == 0
    kept = [row for row in first if row["status"] != "failed"]
    again = run_all(target, orders, 0, Crew(), have=kept, keep=lambda row, _: row)
    assert again == run_all(target, orders, 0, Crew(), keep=lambda row, _: row)
    assert (again[1]["primary_before"], again[1]["points_lost"], again[1]["removed"]) == (0.9, 2.0, True)
    assert summary_counts(again)["marked"] == summary_counts(again)["removed"] == 1


class Strict(HTMLParser):
    """Fails on unbalanced tags and on anything that loads or runs."""

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


def test_the_report_holds_every_row_and_draws_the_rule(job: Job) -> None:
    assert job("--attacks", "int8,permute_channels,average", "--run", "r")[0] == 0
    page = (job.storage / "runs/r/report.html").read_text()
    parser = Strict()
    parser.feed(page)
    assert parser.open == [] and "1 of 3 attacks left fewer than 120 bits" in parser.text
    for told in ("int8", "permute_channels", "which=both", "not applicable", "removed: under 120 bits"):
        assert told in parser.text, told
    assert page.count("<svg") == 1 and 'role="img"' in page and len(page) < 200_000
    result = json.loads((job.storage / "runs/r/result.json").read_text())
    evil = "<script>alert(1)</script>"
    for row in result["rows"]:
        row["reason"] = row["attack"] = evil
    hostile = render_attack_report(result | {"task": evil, "model": evil})
    assert "<script" not in hostile and "&lt;script" in hostile
    empty = [row | {"points_lost": None} for row in result["rows"]]
    assert "<svg" not in render_attack_report(result | {"rows": empty})


def test_rows_in_words(job: Job) -> None:
    row = dict.fromkeys(COLUMNS) | {"attack": "x", "setting": "a=1", "seconds": 1.0}
    assert format_result(row | {"status": "diverged", "reason": "NaN"}) == "x a=1 · diverged: NaN · 1.0 s"
    assert "not verifiable: gone" in format_result(
        row | {"status": "ok", "verdict": "not_verifiable", "reason": "gone", "points_lost": None}
    )


def test_a_model_that_is_not_the_architecture_is_refused(job: Job, tmp_path: Path) -> None:
    tensors = dict(read_model(job.always[1]).tensors)
    del tensors["bn1.weight"]
    (tmp_path / MODEL_FILE).write_bytes(serialize_safetensors(tensors))
    job.always[1] = str(tmp_path / MODEL_FILE)
    code, _, err = job("--attacks", "int8")
    assert code == 2 and "is not the architecture" in err and not job.storage.exists()


def test_a_model_without_the_mark_has_nothing_to_remove(job: Job, marked: Any, tmp_path: Path) -> None:
    base_weights, _ = marked
    (tmp_path / MODEL_FILE).write_bytes(serialize_safetensors(base_weights))
    job.always[1] = str(tmp_path / MODEL_FILE)  # a bare file: its graph and task come from the kit and flags
    code, out, _ = job("--attacks", "int8,permute_channels", "--run", "w0")
    assert code == 0 and out.startswith("the model did not carry 120 bits before any attack")
    assert [r["removed"] for r in table(job.storage, "w0")] == ["", "", ""]
    page = (job.storage / "runs/w0/report.html").read_text()
    assert "nothing to remove" in page and 'class="verdict open"' in page
