"""The jobs around the ledger on a really marked model: the whole way, offline check, backup and restore."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from world import person

from mtlsign.identity import Identity
from mtlsign.sealing import Secret
from mtlsign.storage import open_storage
from mtlsign.tensors import tensor_bytes

ROOT = Path(__file__).resolve().parents[3]


class Desk:
    """Calls the jobs' `main` as a user would, `--json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sys.path.insert(0, str(ROOT / "jobs"))

    def __call__(self, job: str, *argv: object) -> Any:
        import contextlib
        import importlib.util
        import io

        spec = importlib.util.spec_from_file_location(f"job_{job}", ROOT / "jobs" / f"{job}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            module.main([str(word) for word in argv] + ["--json"])
        return json.loads(out.getvalue())

    def identity(self, who: Identity, name: str) -> Path:
        path = self.folder / "people" / f"{name}.json"
        if not path.exists():
            who.save(path, None)
        return path


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_whole_way_through_the_jobs(
    desk: Desk, marked: tuple[Any, Any], owner: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, done = marked
    store, ledger = tmp_path / "store", f"sqlite:///{tmp_path}/ledger.db"
    done.save(open_storage(str(store)), Secret.from_kit_key(owner.kit_key))
    model, kit = Path(str(done.result["model_path"])), Path(str(done.result["kit"]))
    mine = desk.identity(owner, "owner")
    council = [desk.identity(person(f"m{i}"), f"m{i}") for i in range(3)]
    members = ",".join(map(str, council))
    desk("ledger", "found", "--ledger", ledger, "--owner", mine, "--members", members, "--bits", 100)
    published = desk("publish", "--kit", kit, "--model", model, "--ledger", ledger, "--owner", mine,
                     "--card", model / "CARD.md")  # fmt: skip
    (model / "CARD.md").unlink()
    assert published["index"] == 1 and not published["counted"] and published["head"]["size"] >= 1
    rounds = [
        ("council", "--identity", who, "--ledger", ledger, "--once", "--memory", f"{who}.memory")
        for who in council
    ]
    for one in rounds:
        desk(*one)
    noise = {n: 0.01 * torch.randn_like(t) for n, t in done.tensors.items() if t.is_floating_point()}
    tuned = {n: t + noise[n] if n in noise else t for n, t in done.tensors.items()}
    suspect = tmp_path / "suspect.safetensors"
    suspect.write_bytes(tensor_bytes({f"module.{n}": t for n, t in tuned.items()}))
    claimed = desk("claim", "--kit", kit, "--model", suspect, "--ledger", ledger, "--owner", mine)
    for one in [*rounds, *rounds]:
        desk(*one)
    result = desk("dispute", "--ledger", ledger, "--claims", claimed["claim"])
    assert result["statuses"] == {claimed["claim"]: "in_the_weights"}
    assert result["standings"][0]["numbers"]["votes"] == {"accepted": 3} and result["edges"] == []
    packed, head = tmp_path / "claim.zip", tmp_path / "head.txt"
    shutil.rmtree(model)  # what is left of the owner: identity, kit, and a ledger
    backup = tmp_path / "backup"
    shutil.copytree(kit, backup / "kit")
    shutil.copy(mine, backup / "identity.json")
    shutil.rmtree(store)
    mine.unlink()
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path / "another machine"))
    again = desk("claim", "--kit", backup / "kit", "--model", suspect, "--ledger", ledger, "--bundle", packed,
                 "--owner", backup / "identity.json")  # fmt: skip
    assert again["claim"] == claimed["claim"]
    shown = desk("ledger", "head", "--ledger", ledger, "--out", head)
    assert shown["counted"] and len(shown["cosigned"]) >= 2 and shown["current"]
    desk("ledger", "check", "--ledger", ledger, "--head", head)
    proof = desk("ledger", "prove", "--ledger", ledger, "--index", 1)
    assert proof["leaf"] == published["id"] and proof["counted"]
    kinds = [entry["kind"] for entry in desk("ledger", "list", "--ledger", ledger)["entries"]]
    assert kinds == ["membership", "publish", "register", "claim", "vote", "vote", "vote"]
    shutil.rmtree(tmp_path / "ledger.db.archive")
    (tmp_path / "ledger.db").unlink()
    offline = desk("verify", "--bundle", packed, "--head", head, "--card", tmp_path / "CARD.md")
    assert offline["standing"] == "in_the_weights" and offline["accepted"] and offline["status"] == "accepted"
    assert offline["matches"] >= 120 and offline["n"] == 128 and offline["head"]["pinned"]
    assert {
        "gamma",
        "p_value",
        "evidence_bits",
        "chernoff_bound",
        "model_digest",
        "accuracy",
    } <= offline.keys()
    assert "in_the_weights" in (tmp_path / "CARD.md").read_text()


def test_a_ledger_is_founded_by_the_first_publication_and_errors_are_one_line(
    desk: Desk, marked: tuple[Any, Any], owner: Identity, tmp_path: Path
) -> None:
    _, done = marked
    store, ledger = tmp_path / "public" / "store", f"sqlite:///{tmp_path}/l.db"
    done.save(open_storage(str(store)), Secret.from_kit_key(owner.kit_key))
    model, kit = Path(str(done.result["model_path"])), Path(str(done.result["kit"]))
    mine = desk.identity(owner, "owner")
    common = ["--kit", str(kit), "--ledger", ledger, "--owner", str(mine)]

    def job(name: str, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *argv]
        home = os.environ | {"MTLSIGN_HOME": str(tmp_path / "home")}
        return subprocess.run(command, capture_output=True, text=True, env=home, timeout=120)

    refused = job("publish", *common, "--model", str(model))
    assert refused.returncode == 2 and "--already-public" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    told = desk("publish", *common, "--model", model, "--already-public")
    assert told["founded"] and told["counted"] and told["self_attested"] and told["index"] == 1
    assert desk("publish", *common, "--model", model, "--already-public")["index"] == 1
    claimed = desk("claim", *common, "--model", model)
    result = desk("dispute", "--ledger", ledger, "--claims", claimed["index"])
    assert list(result["statuses"].values()) == ["self_attested"]
    for name, argv, words in (
        ("dispute", ["--ledger", ledger, "--claims", "77"], "claims: '77' names no claim"),
        ("council", ["--ledger", ledger, "--identity", str(tmp_path / "none")], "none"),
        ("ledger", ["--ledger", ledger], "action: comes first"),
        (
            "claim",
            [*common, "--ledger", "etcd://127.0.0.1:1", "--archive", "a", "--model", str(model)],
            "TLS",
        ),
    ):
        failed = job(name, *argv)
        assert failed.returncode == 2 and words in failed.stderr and len(failed.stderr.splitlines()) == 1
