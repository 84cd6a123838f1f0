"""The jobs around the ledger on a really marked model: the whole way, offline check, backup and restore."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.config import cli
from mtlsign.storage.locations import open_storage
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.keys.identity import Identity, default_identity_path
from mtlsign.watermark.keys.sealing import EncryptionSecret
from tests.unit.claims.scenario import person

ROOT = Path(__file__).resolve().parents[3]


class Desk:
    """Calls the jobs' `main` as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sys.path.insert(0, str(ROOT / "jobs"))

    def _main(self, job: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"job_{job}", ROOT / "jobs" / f"{job}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    def __call__(self, job: str, *argv: object) -> Any:
        """What it prints with `--json`."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self._main(job)([str(word) for word in argv] + ["--json"])
        return json.loads(out.getvalue())

    def says(self, job: str, *argv: object) -> str:
        """What it prints for people."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self._main(job)([str(word) for word in argv])
        return out.getvalue()

    def fails(self, job: str, *argv: object) -> str:
        """The one line of an exit with code 2."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.run(self._main(job), [str(word) for word in argv])
        assert ended.value.code == 2 and len(err.getvalue().splitlines()) == 1, err.getvalue()
        return err.getvalue()

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
    done.save(open_storage(str(store)), EncryptionSecret.from_kit_key(owner.kit_key))
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
    suspect.write_bytes(serialize_safetensors({f"module.{n}": t for n, t in tuned.items()}))
    claimed = desk("claim", "--kit", kit, "--model", suspect, "--ledger", ledger, "--owner", mine)
    for one in [*rounds, *rounds]:
        desk(*one)
    asked = ("dispute", "--ledger", ledger, "--claims", claimed["claim"])
    result = desk(*asked, "--bits", 100)
    assert result["statuses"] == {claimed["claim"]: "in_the_weights"}
    strict = desk(*asked, "--bits", 129)["standings"][0]  # our own policy, whatever the council's is
    assert (strict["reason"], strict["numbers"]["bits_required"]) == ("not_in_the_weights", 129)
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
    offline = desk(
        "verify", "--bundle", packed, "--head", head, "--bits", 100, "--card", tmp_path / "CARD.md"
    )
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
    done.save(open_storage(str(store)), EncryptionSecret.from_kit_key(owner.kit_key))
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


def test_the_walkthrough_of_the_documentation(
    desk: Desk, marked: tuple[Any, Any], owner: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/claims.md, "By hand" and "Backup", as typed."""
    _, done = marked
    monkeypatch.chdir(tmp_path)
    owner.save(default_identity_path(), None)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    done.save(open_storage("mtlsign-store"), EncryptionSecret.from_kit_key(owner.kit_key))
    kit, model = Path(str(done.result["kit"])), Path(str(done.result["model_path"]))
    shutil.copytree(model, "stolen")
    names = {"ID": kit.name, "DIGEST": model.name, "SUSPECT": "stolen", "BACKUP": "backup"}
    text = (ROOT / "docs" / "claims.md").read_text("utf-8")
    walk = text.partition("By hand")[2].partition("\n## ")[0] + text.partition("## Backup")[2]
    commands = re.findall(r"^(?:uv run|cp) .*$", walk, re.MULTILINE)
    assert len(commands) > 15
    shown = ""
    for command in commands:
        for name, value in names.items():
            command = re.sub(rf"\b{name}\b", value, command)
        words = command.replace("~/.config/mtlsign/identity.json", str(default_identity_path())).split()
        if words[0] == "cp":
            Path(words[-1]).parent.mkdir(exist_ok=True)
            subprocess.run(words, check=True)
            continue
        assert words[:2] == ["uv", "run"] and words[2].startswith("jobs/"), command
        shown = desk.says(Path(words[2]).stem, *words[3:])
        if words[2] == "jobs/claim.py":
            names["CLAIM"] = shown.split()[1]
        if "dispute" in words[2] or "--bundle" in words:
            assert "in_the_weights" in shown, shown
    card = Path("CARD.md").read_text()
    assert "## Provenance" in card and f"SHA-256 `{model.name}`" in card and "in_the_weights" in card


def test_wrong_input_is_told_in_one_line(
    desk: Desk, marked: tuple[Any, Any], owner: Identity, tmp_path: Path
) -> None:
    base_weights, done = marked
    store, ledger = tmp_path / "store", f"sqlite:///{tmp_path}/l.db"
    done.save(open_storage(str(store)), EncryptionSecret.from_kit_key(owner.kit_key))
    model, kit = Path(str(done.result["model_path"])), Path(str(done.result["kit"]))
    mine, member = desk.identity(owner, "owner"), desk.identity(person("m"), "m")
    desk("publish", "--kit", kit, "--model", model, "--ledger", ledger, "--owner", mine)
    text, short, innocent = tmp_path / "text", tmp_path / "short.db", tmp_path / "innocent.safetensors"
    text.write_text("hello")
    short.write_bytes((tmp_path / "l.db").read_bytes()[:9000])
    innocent.write_bytes(serialize_safetensors(base_weights))
    (tmp_path / "junk.safetensors").write_bytes(bytes(100))
    huge = {}
    for name, size in (("huge.safetensors", 3 * 2**30), ("huge.zip", 7 * 2**30), ("huge.sealed", 3 * 2**30)):
        huge[name] = tmp_path / name
        with open(huge[name], "wb") as file:
            file.truncate(size)  # takes no room
    publish = ("publish", "--model", model, "--owner", mine)
    claim = ("claim", "--kit", kit, "--ledger", ledger, "--owner", mine)
    at = ("--ledger", ledger)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("nowhere is no complete folder", (*publish, *at, "--kit", tmp_path / "nowhere")),
        ("lacks kit.sealed", (*publish, *at, "--kit", model)),
        ("2147485632 bytes allowed", (*publish, *at, "--kit", huge["huge.sealed"])),
        ("kit key is wrong", (*publish, *at, "--kit", kit, "--owner", member)),
        ("ledger: knows no such place", (*publish, "--kit", kit, "--ledger", "postgres://x")),
        ("name a place that you can write", (*publish, "--kit", kit, "--ledger", "sqlite:////proc/no/l.db")),
        ("is not a database", (*publish, "--kit", kit, "--ledger", f"sqlite:///{text}")),
        ("restore it from a copy", (*publish, "--kit", kit, "--ledger", f"sqlite:///{short}")),
        ("mutual TLS only", (*publish, "--kit", kit, "--ledger", "etcd://127.0.0.1:1")),
        ("origin: is not the one", (*publish, "--kit", kit, *at, "--origin", "0" * 64)),
        ("docs/claims.md says", (*publish, "--kit", kit, *at, "--licence", "a\u202eb", "--already-public")),
        ("no complete folder", (*claim, "--model", text)),
        ("2147483648 bytes allowed", (*claim, "--model", huge["huge.safetensors"])),
        ("safetensors", (*claim, "--model", tmp_path / "junk.safetensors")),
        ("no key was opened", (*claim, "--model", innocent)),
        ("new.db is not there", (*claim, "--model", model, "--ledger", f"sqlite:///{tmp_path}/new.db")),
        ("identity: ", ("council", *at, "--once", "--identity", tmp_path / "none")),
        ("memory: is not UTF-8", ("council", *at, "--once", "--identity", member, "--memory", text)),
        ("claims: '77' names no claim", ("dispute", *at, "--claims", "77")),
        ("claims: names none", ("dispute", *at, "--claims", ",")),
        ("action: comes first", ("ledger", *at)),
        ("has 2 entries, not 10", ("ledger", "prove", *at, "--index", "9")),
        ("is no head of a ledger", ("ledger", "check", *at, "--head", text)),
        ("is founded already", ("ledger", "found", *at, "--owner", mine)),
        ("bundle: is no readable ZIP", ("verify", "--bundle", text)),
        ("at most 6 GiB", ("verify", "--bundle", huge["huge.zip"])),
        ("No such file", ("verify", "--bundle", tmp_path / "none.zip")),
    ]
    for words, (job, *argv) in cases:
        told = desk.fails(str(job), *argv)
        assert words in told and len(told) < 500, told
    assert len(desk("ledger", "list", *at)["entries"]) == 2  # nothing of all this left a trace
