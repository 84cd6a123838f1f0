"""Claim jobs on a really marked model: lifecycle, offline check, backup and restore, and error messages."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtlsign
from mtlsign.config import cli
from mtlsign.storage.locations import open_storage
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.tasks import Task
from mtlsign.watermark.keys.identity import Identity, default_identity_path
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import write_kit
from tests.conftest import TINY
from tests.unit.claims.scenario import make_identity

ROOT = Path(__file__).resolve().parents[4]


class JobRunner:
    """Caller of the jobs' `main` functions, as a user would start them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _main(self, job: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"job_{job}", ROOT / "jobs" / f"{job}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main

    def __call__(self, job: str, *argv: object) -> Any:
        """Run a job and return its JSON output."""
        return json.loads(self.stdout(job, *argv, "--json"))

    def stdout(self, job: str, *argv: object) -> str:
        """Run a job and return its standard output."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self._main(job)([str(word) for word in argv])
        return out.getvalue()

    def error_line(self, job: str, *argv: object) -> str:
        """Run a job that must exit with code 2, and return its single line of standard error."""
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.run(self._main(job), [str(word) for word in argv])
        assert ended.value.code == 2 and len(err.getvalue().splitlines()) == 1, err.getvalue()
        return err.getvalue()

    def identity(self, identity: Identity, name: str) -> Path:
        """Save an identity and return its file."""
        path = self.folder / "people" / f"{name}.json"
        if not path.exists():
            identity.save(path, None)
        return path


@pytest.fixture
def jobs(tmp_path: Path) -> JobRunner:
    return JobRunner(tmp_path)


def save_result(embedding: Any, store: Path | str, owner: Identity) -> tuple[Path, Path]:
    """Save an embedding result to a store and return the paths of model and kit."""
    embedding.save(open_storage(str(store)), EncryptionSecret.from_kit_key(owner.kit_key))
    return Path(str(embedding.result["model_path"])), Path(str(embedding.result["kit"]))


def write_noisy_copy(embedding: Any, path: Path) -> None:
    """Write the marked model with small noise and prefixed names, as a suspect.

    The key has 128 bits, of which one may be lost, so that the noise is the same in every run and very small.
    """
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: t + 0.001 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in embedding.tensors.items()
    }
    path.write_bytes(serialize_safetensors({f"module.{n}": t for n, t in noisy.items()}))


def test_claim_jobs_from_publication_to_offline_check_after_restore(
    jobs: JobRunner,
    marked_model: tuple[Any, Any],
    owner: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, at_ledger = tmp_path / "store", ("--ledger", f"sqlite:///{tmp_path}/ledger.db")
    model, kit = save_result(marked_model[1], store, owner)
    owner_file = jobs.identity(owner, "owner")
    council = [jobs.identity(make_identity(f"m{i}"), f"m{i}") for i in range(3)]
    members = [word for member in council for word in ("--members", member)]
    jobs("ledger", "create", *at_ledger, "--owner", owner_file, *members, "--min-evidence-bits", 100)
    card = model / "CARD.md"
    published = jobs(
        "publish", "--kit", kit, "--model", model, *at_ledger, "--owner", owner_file, "--card", card
    )
    card.unlink()
    assert published["index"] == 1 and not published["counted"] and published["head"]["size"] >= 1
    rounds = [
        ("council", "--identity", member, *at_ledger, "--once", "--witness-state", f"{member}.witness")
        for member in council
    ]
    for member_round in rounds:
        jobs(*member_round)
    suspect = tmp_path / "suspect.safetensors"
    write_noisy_copy(marked_model[1], suspect)
    claim = ("claim", "--kit", kit, "--model", suspect, *at_ledger, "--owner", owner_file)
    size = len(jobs("ledger", "list", *at_ledger)["entries"])
    plan = jobs(*claim, "--dry-run")
    assert (plan["claim"], plan["registration"], plan["key"], plan["keys"]) == (None, None, 0, 1)
    assert len(jobs("ledger", "list", *at_ledger)["entries"]) == size  # nothing was written
    assert not (tmp_path / "ledger.db.archive").exists()
    registered = jobs(*claim, "--confirmation-timeout", 0)
    assert registered["claim"] is None and not registered["registration_counted"]
    kinds = [entry["kind"] for entry in jobs("ledger", "list", *at_ledger)["entries"]]
    assert kinds == ["membership", "publish", "register"]  # no key was opened
    for member_round in rounds:
        jobs(*member_round)
    claimed = jobs(*claim)
    assert claimed["registration"] == registered["registration"] and claimed["registration_counted"]
    for member_round in [*rounds, *rounds]:
        jobs(*member_round)
    dispute = ("dispute", *at_ledger, "--claims", claimed["claim"])
    result = jobs(*dispute, "--min-evidence-bits", 100)
    assert result["statuses"] == {claimed["claim"]: "supported"}
    # The verifier's policy applies in addition to the council's.
    strict = jobs(*dispute, "--min-evidence-bits", 129)["standings"][0]
    assert (strict["reason"], strict["numbers"]["bits_required"]) == ("not_in_the_weights", 129)
    assert result["standings"][0]["numbers"]["votes"] == {"accepted": 3} and result["edges"] == []
    bundle, checkpoint = tmp_path / "claim.zip", tmp_path / "head.txt"
    # Only the backup (identity and kit) and the ledger remain.
    shutil.rmtree(model)
    backup = tmp_path / "backup"
    shutil.copytree(kit, backup / "kit")
    shutil.copy(owner_file, backup / "identity.json")
    shutil.rmtree(store)
    owner_file.unlink()
    monkeypatch.setenv("MTLSIGN_HOME", str(tmp_path / "another machine"))
    repeated = jobs(
        "claim", "--kit", backup / "kit", "--model", suspect, *at_ledger, "--bundle", bundle,
        "--owner", backup / "identity.json",
    )  # fmt: skip
    assert repeated["claim"] == claimed["claim"]
    newest = jobs("ledger", "head", *at_ledger, "--output", checkpoint)
    assert newest["counted"] and len(newest["cosigned"]) >= 2 and newest["current"]
    jobs("ledger", "check", *at_ledger, "--head", checkpoint)
    proof = jobs("ledger", "prove", *at_ledger, "--index", 1)
    assert proof["leaf"] == published["id"] and proof["counted"]
    kinds = [entry["kind"] for entry in jobs("ledger", "list", *at_ledger)["entries"]]
    assert kinds == ["membership", "publish", "register", "claim", "vote", "vote", "vote"]
    shutil.rmtree(tmp_path / "ledger.db.archive")
    (tmp_path / "ledger.db").unlink()
    report, card_alone = tmp_path / "report.html", tmp_path / "ALONE.md"
    offline = jobs(
        "verify", "--bundle", bundle, "--head", checkpoint, "--min-evidence-bits", 100,
        "--card", tmp_path / "CARD.md", "--report", report,
    )  # fmt: skip
    page = report.read_text("utf-8")
    assert offline["suspect"] in page and "2 of 3 members" in page and owner.public_key.hex() in page
    alone = jobs.stdout(
        "verify", "--bundle", bundle, "--min-evidence-bits", 100, "--card", card_alone, "--report", report
    )
    for output in (alone, card_alone.read_text("utf-8"), report.read_text("utf-8")):
        assert "self_attested" in output and "supported" not in output and "only confirms itself" in output
    assert offline["standing"] == "supported" and offline["accepted"] and offline["status"] == "accepted"
    assert offline["matches"] >= 120 and offline["n"] == 128 and offline["head"]["pinned"]
    verdict_fields = {"gamma", "p_value", "evidence_bits", "chernoff_bound", "model_digest", "accuracy"}
    assert verdict_fields <= offline.keys()
    assert "supported" in (tmp_path / "CARD.md").read_text()


def test_publish_without_ledger_creates_it_and_public_model_is_refused(
    jobs: JobRunner, marked_model: tuple[Any, Any], owner: Identity, tmp_path: Path
) -> None:
    model, kit = save_result(marked_model[1], tmp_path / "public" / "store", owner)
    ledger, owner_file = f"sqlite:///{tmp_path}/l.db", jobs.identity(owner, "owner")
    common = ["--kit", str(kit), "--ledger", ledger, "--owner", str(owner_file)]
    assert "--allow-public" in jobs.error_line("publish", *common, "--model", model)
    published = jobs("publish", *common, "--model", model, "--allow-public")
    assert published["founded"] and published["counted"]
    assert published["self_attested"] and published["index"] == 1
    assert jobs("publish", *common, "--model", model, "--allow-public")["index"] == 1
    claimed = jobs("claim", *common, "--model", model)
    result = jobs("dispute", "--ledger", ledger, "--claims", claimed["index"])
    assert list(result["statuses"].values()) == ["self_attested"]


def test_claim_with_trace_opens_the_key_of_the_copy_in_the_suspect(
    jobs: JobRunner,
    marked_model: tuple[Any, Any],
    tiny_task: Task,
    tiny_model: Callable[..., nn.Module],
    tiny_graph: dict[str, object],
    owner: Identity,
    tmp_path: Path,
) -> None:
    options = {k: v for k, v in TINY.items() if k not in ("task", "model", "width")}
    options |= {"seed": 1, "recipient": "Bob", "identity": owner, "architecture": tiny_graph}
    second = mtlsign.embed(tiny_model(), tiny_task, trained=True, **options)
    owner_file = jobs.identity(owner, "owner")
    common = ("--ledger", f"sqlite:///{tmp_path}/ledger.db", "--owner", owner_file)
    kits, entries = [], {}
    for name, embedding in (("Alice", marked_model[1]), ("Bob", second)):
        model, kit = save_result(embedding, tmp_path / "store", owner)
        kits += ["--kit", kit]
        release = ("publish", "--kit", kit, "--model", model, "--recipient", name, "--allow-public")
        entries[name] = jobs(*release, *common)["index"]
    suspect = tmp_path / "suspect.safetensors"
    for name, embedding in (("Bob", second), ("Alice", marked_model[1])):
        write_noisy_copy(embedding, suspect)
        claim = ("claim", *kits, "--model", suspect, *common)
        assert "different models" in jobs.error_line(*claim)
        assert jobs(*claim, "--trace", "--dry-run")["publication"] == entries[name]
    bundle = tmp_path / "claim.zip"
    assert jobs(*claim, "--trace", "--bundle", bundle)["publication"] == entries["Alice"]
    assert jobs("verify", "--bundle", bundle)["recipient"] == "Alice"
    suspect.write_bytes(serialize_safetensors(marked_model[0]))
    assert "traced to no copy" in jobs.error_line(*claim, "--trace")


def test_commands_of_the_documentation_succeed(
    jobs: JobRunner,
    marked_model: tuple[Any, Any],
    owner: Identity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command of docs/claims.md in the sections "Step by step" and "Backup of an owner", as written."""
    monkeypatch.chdir(tmp_path)
    owner.save(default_identity_path(), None)
    monkeypatch.setenv("HOME", str(tmp_path / "unused"))
    model, kit = save_result(marked_model[1], "mtlsign-store", owner)
    shutil.copytree(model, "stolen")
    names = {"ID": kit.name, "DIGEST": model.name, "SUSPECT": "stolen", "BACKUP": "backup"}
    text = (ROOT / "docs" / "claims.md").read_text("utf-8")
    sections = text.partition("### Step by step")[2].partition("\n## ")[0] + text.partition("## Backup")[2]
    commands = re.findall(r"^(?:uv run jobs|cp) ?.*$", sections, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        for name, value in names.items():
            command = re.sub(rf"\b{name}\b", value, command)
        words = command.replace("~/.config/mtlsign/identity.json", str(default_identity_path())).split()
        if words[0] == "cp":
            Path(words[-1]).parent.mkdir(exist_ok=True)
            subprocess.run(words, check=True)
            continue
        assert words[:2] == ["uv", "run"] and words[2].startswith("jobs/"), command
        output = jobs.stdout(Path(words[2]).stem, *words[3:])
        if "--dry-run" in words:
            assert "would open and spend key 0 of 1" in output and "Nothing was written" in output
        elif "--confirmation-timeout" in words:
            assert "Registered as entry 2. No key was opened." in output and "Run the same command" in output
        elif words[2] == "jobs/claim.py":
            names["CLAIM"] = output.split()[1]
        if "dispute" in words[2] or "--bundle" in words:
            assert "supported" in output, output
    card = Path("CARD.md").read_text()
    assert "## Provenance" in card and f"SHA-256 `{model.name}`" in card and "supported" in card


def test_claim_jobs_with_invalid_input_fail_with_one_line(
    jobs: JobRunner, marked_model: tuple[Any, Any], owner: Identity, tmp_path: Path
) -> None:
    base_weights, embedding = marked_model
    ledger = f"sqlite:///{tmp_path}/l.db"
    model, kit = save_result(embedding, tmp_path / "store", owner)
    owner_file, member = jobs.identity(owner, "owner"), jobs.identity(make_identity("m"), "m")
    jobs("publish", "--kit", kit, "--model", model, "--ledger", ledger, "--owner", owner_file)
    text, short, innocent = tmp_path / "text", tmp_path / "short.db", tmp_path / "innocent.safetensors"
    text.write_text("hello")
    checkpoint = tmp_path / "x.pth"
    checkpoint.write_bytes(b"\x80\x02")
    short.write_bytes((tmp_path / "l.db").read_bytes()[:9000])
    innocent.write_bytes(serialize_safetensors(base_weights))
    (tmp_path / "junk.safetensors").write_bytes(bytes(100))
    huge = {}
    for name, size in (("huge.safetensors", 3 * 2**30), ("huge.zip", 7 * 2**30), ("huge.sealed", 3 * 2**30)):
        huge[name] = tmp_path / name
        with open(huge[name], "wb") as file:
            file.truncate(size)  # a sparse file occupies no space
    weak_kit = replace(embedding.kit, info=embedding.kit.info | {"status": "rejected"})
    weak_store, secret = open_storage(str(tmp_path / "weak")), EncryptionSecret.from_kit_key(owner.kit_key)
    weak = tmp_path / "weak" / "kits" / write_kit(weak_store, weak_kit, secret)
    publish = ("publish", "--model", model, "--owner", owner_file)
    claim = ("claim", "--kit", kit, "--ledger", ledger, "--owner", owner_file)
    at = ("--ledger", ledger)
    bidi = ("--licence", "a\u202eb", "--allow-public")
    state = ("--witness-state", text)
    cases: list[tuple[str, tuple[object, ...]]] = [
        (
            "kit: " + str(tmp_path / "nowhere") + " does not exist",
            (*publish, *at, "--kit", tmp_path / "nowhere"),
        ),
        ("was rejected when it was embedded", (*publish, *at, "--kit", weak)),
        ("lacks kit.sealed", (*publish, *at, "--kit", model)),
        ("2147485632 bytes allowed", (*publish, *at, "--kit", huge["huge.sealed"])),
        ("The kit belongs to identity", (*publish, *at, "--kit", kit, "--owner", member)),
        ("ledger: The URI has an unknown scheme", (*publish, "--kit", kit, "--ledger", "postgres://x")),
        ("Use a writable location", (*publish, "--kit", kit, "--ledger", "sqlite:////proc/no/l.db")),
        ("is not a database", (*publish, "--kit", kit, "--ledger", f"sqlite:///{text}")),
        ("restore the file from a copy", (*publish, "--kit", kit, "--ledger", f"sqlite:///{short}")),
        ("requires mutual TLS", (*publish, "--kit", kit, "--ledger", "etcd://127.0.0.1:1")),
        ("origin: This ledger has the origin", (*publish, "--kit", kit, *at, "--origin", "0" * 64)),
        ("See docs/claims.md", (*publish, "--kit", kit, *at, *bidi)),
        ("is a file of an unknown format", (*claim, "--model", text)),
        ("model: " + str(tmp_path / "x.pth") + " is a PyTorch checkpoint", (*claim, "--model", checkpoint)),
        ("nowhere does not exist", (*claim, "--model", tmp_path / "nowhere")),
        ("ledger: The URI has an unknown scheme", (*claim, "--model", model, "--ledger", tmp_path / "l.db")),
        ("ledger: The URI has an", ("council", "--ledger", "l.db", "--identity", member)),
        ("2147483648 bytes allowed", (*claim, "--model", huge["huge.safetensors"])),
        ("safetensors", (*claim, "--model", tmp_path / "junk.safetensors")),
        ("no key was opened", (*claim, "--model", innocent)),
        ("new.db does not exist", (*claim, "--model", model, "--ledger", f"sqlite:///{tmp_path}/new.db")),
        ("identity: ", ("council", *at, "--once", "--identity", tmp_path / "none")),
        (
            "witness-state: The document is not UTF-8",
            ("council", *at, "--once", "--identity", member, *state),
        ),
        ("claims: '77' is not a claim", ("dispute", *at, "--claims", "77")),
        ("claims: ',' is not a claim", ("dispute", *at, "--claims", ",")),
        ("action: The first argument", ("ledger", *at)),
        ("has 2 entries, not 10", ("ledger", "prove", *at, "--index", "9")),
        ("is not a checkpoint", ("ledger", "check", *at, "--head", text)),
        ("exists already", ("ledger", "create", *at, "--owner", owner_file)),
        ("bundle: The file is not a ZIP", ("verify", "--bundle", text)),
        ("at most 6 GiB", ("verify", "--bundle", huge["huge.zip"])),
        ("No such file", ("verify", "--bundle", tmp_path / "none.zip")),
    ]
    for words, (job, *argv) in cases:
        message = jobs.error_line(str(job), *argv)
        assert words in message and len(message) < 500, message
    assert len(jobs("ledger", "list", *at)["entries"]) == 2  # the failed jobs appended nothing
