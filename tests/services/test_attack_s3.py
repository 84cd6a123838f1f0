"""Tests of an attack run on a real S3 server: model and kit are read from it, results written to it."""

from __future__ import annotations

import csv
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from mtlsign.config import cli
from mtlsign.storage.locations import open_storage
from mtlsign.storage.model_folder import read_model
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from tests.helpers.seaweedfs_server import S3Server

pytestmark = [pytest.mark.services, pytest.mark.timeout(300), pytest.mark.usefixtures("empty_figures")]

FACTORY = """
import torch
from mtlsign.tasks import from_tensors
def task(seed):
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    return from_tensors(torch.rand(120, 1, 24, 24, generator=gen), y, seed=seed)
"""


def test_attack_run_reads_from_and_writes_to_s3(
    s3: S3Server, marked_model: Any, owner: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "s3task.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    identity = tmp_path / "owner" / "identity.json"
    identity.parent.mkdir(mode=0o700)
    owner.save(identity, None)
    location = f"s3://{s3.bucket}/attack"
    store, embedding = open_storage(location, endpoint=s3.endpoint), marked_model[1]
    embedding.save(store, EncryptionSecret.from_kit_key(owner.kit_key))
    main = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "attack.py"))["main"]
    flags = [
        "--model", embedding.result["model_path"], "--kit", embedding.result["kit"], "--owner", str(identity),
        "--task", "s3task:task", "--storage", location, "--endpoint", s3.endpoint, "--workers", "0",
        "--attacks", "int8,permute_channels", "--run", "a", "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.run(main, flags)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    result = json.loads(out)
    names = {name.removeprefix("runs/a/").split("/")[0] for name in store.list("runs/a")}
    assert names == {
        "settings.json", "attacks.csv", "attacks.parquet", "result.json", "report.html", "manifest.json",
        "models",
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(store.read("runs/a/attacks.csv", 2**20).decode())))
    assert [row["attack"] for row in rows] == ["none", "int8", "permute_channels"]
    for row in rows:
        assert read_model(row["model"]).digest == row["model_digest"]
    assert json.loads(store.read("runs/a/result.json", 2**20)) == result
