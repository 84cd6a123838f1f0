"""Jobs on the command line: output, exit codes, one line for invalid input and no files from it."""

from __future__ import annotations

import json
import pickle
import runpy
import shlex
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mtlsign.config import cli
from mtlsign.models import architectures
from mtlsign.watermark.keys.identity import Identity
from tests.conftest import replace_figures
from tests.helpers.job_harness import ROOT, JobLauncher, exit_code_of

pytestmark = pytest.mark.usefixtures("empty_figures")

Ran = tuple[int, str, str]
Run = Callable[..., Ran]

#: Seconds, not minutes: one process, few steps.
QUICK = shlex.split(
    "--task digits --width 8 --head keyed --key-size 128 --phase1.epochs 1 --phase2.steps 10 "
    "--phase1.batch 64 --phase2.batch 16 --lambda2 0 --workers 0 --insecure-test-key"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a job in this process: (exit code, stdout, stderr)."""

    def call(name: str, *argv: str) -> Ran:
        capsys.readouterr()
        return exit_code_of(name, *argv), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Valid and invalid input files."""
    folder = tmp_path_factory.mktemp("inputs")
    narrow = architectures.build(
        architectures.architecture_for("resnet18", channels=1, classes=10, width=8, stem="stock")
    ).state_dict()
    wide = architectures.build(
        architectures.architecture_for("resnet18", channels=1, classes=10, width=12, stem="stock")
    ).state_dict()
    torch.save({f"module.{name}": t for name, t in narrow.items()}, folder / "prefixed.pt")
    save_file(narrow, folder / "good.safetensors")
    save_file(wide, folder / "wide.safetensors")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"weights": Path("a")}))
    torch.save({"optimizer": print}, folder / "objects.pt")
    (folder / "text.safetensors").write_text("no tensors here")
    (folder / "file").write_text("in the way")
    (folder / "typo.yaml").write_text("lamda1: 0.1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "bad.yaml").write_text("a: [1\n")
    for name in ("good-pass", "bad-pass", "empty"):
        (folder / name).touch(mode=0o600)
    (folder / "good-pass").write_text("right\n")
    (folder / "bad-pass").write_text("wrong\n")
    (folder / "empty").write_text("")
    Identity.generate().save(folder / "owner", b"right")
    return {
        "dir": str(folder),
        **{p.stem if p.suffix != ".yaml" else f"{p.stem}_yaml": str(p) for p in folder.iterdir()},
    }


BAD = {
    "unknown setting": ("--lamda1 0.1", "--lamda1: Unknown setting. Did you mean 'lambda1'?"),
    "unknown setting in a file": ("--config {typo_yaml}", "lamda1: Unknown setting. Did you mean 'lambda1'?"),
    "no mapping": ("--config {list_yaml}", "config: The file is not a mapping"),
    "no YAML": ("--config {bad_yaml}", "config: The file is not YAML"),
    "no config": ("--config {dir}/none.yaml", "config: The file '"),
    "no value": ("--lambda1", "Argument --lambda1: expected one argument. See --help."),
    "negative lambda1": ("--lambda1 -1", "lambda1: Input should be greater than or equal to 0 (got '-1')"),
    "negative lambda2": (
        "--lambda2 -0.5",
        "lambda2: Input should be greater than or equal to 0 (got '-0.5')",
    ),
    "no number": ("--lambda1 much", "lambda1: Input should be a valid number"),
    "key too small": ("--key-size 64", "key-size: Input should be greater than or equal to 128"),
    "key too large": ("--key-size 5000", "key-size: Input should be less than or equal to 4096"),
    "image too small": ("--carrier-size 20", "carrier-size: Input should be greater than or equal to 21"),
    "unknown perturbation": ("--perturbation.kinds noise,rotated", "perturbation.kinds: "),
    "unknown task": ("--task dogs", "task: "),
    "unknown model": ("--model resnet19", "model: "),
    "model without a module": ("--model no_such_package.models:make", "model: "),
    "tap that does not exist": ("--taps layer9", "taps: "),
    "one tap that does not exist": ("--taps layer1,layer1.0.conv7", "taps: "),
    "control characters in the name": ("--name a\x07b", "spec.name: "),
    "missing data": ("--task mnist --data {dir}/none", "data: "),
    "data root not given": ("--task mnist", "data: "),
    "no checkpoint": ("--weights {dir}/none.pt", "weights: "),
    "wrong shapes": ("--weights {wide}", "weights: "),
    "a pickle": ("--weights {pickle}", "weights: "),
    "a pickle of functions": ("--weights {objects}", "weights: "),
    "no safetensors": ("--weights {text}", "weights: "),
    "pretrained for a plain network": ("--weights pretrained", "weights: "),
    "storage behind a file": ("--storage {file}/below", "storage: "),
    "storage is a file": ("--storage {file}", "storage: "),
    "storage of another kind": ("--storage ftp://host/x", "storage: "),
    "credentials in the storage": ("--storage s3://id:secret@bucket/x", "storage: "),
    "wrong passphrase": (
        "--owner {owner} --passphrase-file {bad-pass}",
        "passphrase: The passphrase is wrong",
    ),
    "no passphrase": ("--owner {owner}", "passphrase: This identity needs a passphrase"),
    "empty passphrase": ("--owner {owner} --passphrase-file {empty}", "passphrase_file: "),
    "no owner": ("--owner {dir}/absent", "owner: "),
    "not an owner": ("--owner {file}", "owner: "),
    "unknown run": ("--resume nothing", "resume: There is no run 'nothing'"),
    "run name that leaves the folder": ("--run ../x", "run: "),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD.keys())
def test_embed_invalid_input_is_one_line_with_code_2_and_no_files(
    run: Run, inputs: dict[str, str], tmp_path: Path, flags: str, message: str
) -> None:
    storage = tmp_path / "store"
    argv = [part.format_map(inputs) for part in flags.split()]
    before = {p: p.read_bytes() for p in Path(inputs["dir"]).iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        code, out, err = run("embed", *QUICK, "--storage", str(storage), *argv)
    assert (code, out) == (2, ""), err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and len(err) < 600
    assert not storage.exists()
    assert {p: p.read_bytes() for p in Path(inputs["dir"]).iterdir()} == before
    assert "secret" not in err


def test_embed_unreachable_s3_is_reported_soon(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id-to-hide")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-to-hide")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        code, out, err = run("embed", *QUICK, "--storage", "s3://bucket/x", "--endpoint", endpoint)
    assert (
        (code, out, err.count("\n")) == (2, "", 1)
        and err.startswith("error: storage: ")
        and "hide" not in err
    )
    assert time.monotonic() - began < 15


def test_embed_owner_inside_the_storage_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path / "store/home"))
    code, _, err = run("embed", *QUICK, "--storage", str(tmp_path / "store"))
    assert code == 2 and err.startswith("error: owner: ") and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One quick run named `q`: (storage, MTLSIGN_HOME)."""
    store, home = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("MTLSIGN_HOME", str(home))
        replace_figures(patch)
        main = runpy.run_path(str(ROOT / "jobs" / "embed.py"))["main"]
        cli.run(main, [*QUICK, "--storage", str(store), "--run", "q", "--quiet"])
    return store, home


def _result(finished: tuple[Path, Path]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((finished[0] / "runs/q/result.json").read_text())
    return result


def test_embed_used_name_and_finished_run_are_refused(run: Run, finished: tuple[Path, Path]) -> None:
    store = finished[0]
    before = sorted(store.rglob("*"))
    for flags, message in (
        (("--run", "q"), "error: run: Run 'q' exists"),
        (("--resume", "q"), "error: resume: Run 'q' is finished"),
    ):
        code, out, err = run("embed", *QUICK, "--storage", str(store), *flags)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(message)
    assert sorted(store.rglob("*")) == before


def test_embed_json_is_one_document_and_quiet_prints_the_result(
    run: Run, tmp_path: Path, finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLSIGN_HOME", str(finished[1]))
    code, out, err = run("embed", *QUICK, "--storage", str(tmp_path), "--run", "j", "--json")
    result = json.loads(out)
    assert code == 3 and err == f"error: {result['problem']}\n" and "128 bits match" in result["problem"]
    assert result == json.loads((tmp_path / "runs/j/result.json").read_text())
    assert result["model_digest"] == _result(finished)["model_digest"]  # the same owner, seed and test key
    code, out, err = run("embed", *QUICK, "--storage", str(tmp_path), "--run", "k", "--quiet")
    assert code == 3 and err == f"error: {result['problem']}\n" and "DO NOT PUBLISH" in out
    assert out.splitlines()[-1] == f"result: {tmp_path}/runs/k/result.json"


@pytest.mark.parametrize("name", ["good", "prefixed"])
def test_embed_trained_checkpoint_skips_phase_1(
    run: Run, inputs: dict[str, str], tmp_path: Path, name: str
) -> None:
    code, out, err = run("embed", *QUICK, "--storage", str(tmp_path), "--weights", inputs[name], "--json")
    result = json.loads(out)
    assert code == 3 and err.count("\n") == 1, "10 steps are too few"
    assert result["seconds_phase1"] == 0 and result["seconds_phase2"] > 0


def test_verify_one_model_and_several_models_print_verdicts(
    run: Run, finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str]
) -> None:
    monkeypatch.setenv("MTLSIGN_HOME", str(finished[1]))
    result = _result(finished)
    code, out, err = run("verify", "--model", result["model_path"], "--kit", result["kit"], "--json")
    assert (code, err) == (0, "") and json.loads(out)["matches"] == result["matches"]
    models = ["--model", result["model_path"], "--model", inputs["good"]]
    code, out, err = run("verify", *models, "--kit", result["kit"], "--json", "--min-evidence-bits", "0")
    assert (code, err) == (0, "") and [v["accepted"] for v in json.loads(out)] == [True, True]
    code, out, err = run("verify", *models, "--kit", result["kit"])
    assert (code, err) == (0, "") and out.startswith(result["model_path"]) and "control" in out


@pytest.mark.parametrize(
    "flags",
    [
        "--model {dir}/none --kit {kit}",
        "--model {text} --kit {kit}",
        "--model {pickle} --kit {kit}",
        "--model {model} --kit {dir}",
        "--model {model} --kit {file}",
        "--model {model} --kit {kit} --kit-passphrase-file {bad-pass}",
        "--model {model} --kit {kit} --owner {owner} --passphrase-file {good-pass}",
        "--model {model}",
        "--model {model} --kit {kit} --gamma 0.5",
    ],
)
def test_verify_invalid_input_is_one_line_with_code_2(
    run: Run, finished: tuple[Path, Path], inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setenv("MTLSIGN_HOME", str(finished[1]))
    result = _result(finished)
    places = {**inputs, "model": result["model_path"], "kit": result["kit"]}
    code, out, err = run("verify", *flags.format_map(places).split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err


# -- as processes ------------------------------------------------------------------


def test_embed_too_many_workers_are_refused_before_ray_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, err = run("embed", *QUICK, "--workers", "4096", "--storage", str(tmp_path / "s"))
    assert (code, out) == (2, "") and err.startswith("error: workers: 4096 workers need 4096 CPUs")
    assert err.count("\n") == 1 and not (tmp_path / "s").exists() and not ray.is_initialized()


def test_embed_on_a_cluster_requires_an_owner(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, out, err = run("embed", "--storage", str(tmp_path / "s"))
    assert (code, out) == (2, "") and err.startswith("error: owner: An identity is required on a cluster")
    assert err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_embed_interrupted_run_prints_one_line_and_continues(
    jobs: JobLauncher, run: Run, tmp_path: Path
) -> None:
    job = jobs.embed(*QUICK, "--phase2.steps", "2000", "--quiet", "--run", "i", storage=tmp_path)
    job.until((tmp_path / "runs/i/checkpoints/mark.pt").exists)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(130) == "" and job.err == "interrupted; continue with --resume NAME\n"
    files = {p.name for p in (tmp_path / "runs/i").iterdir()}
    assert files == {"settings.json", "checkpoints", "phase1.safetensors", "phase1.json", "commitment.sealed"}
    changed = [*jobs.as_owner, "--storage", str(tmp_path), "--lambda1", "0.5"]
    code, out, err = run("embed", "--resume", "i", *changed)
    assert (code, out) == (2, "") and err.startswith("error: lambda1: Run 'i' has the value 0.001.")
