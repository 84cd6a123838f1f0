"""Claim protocol from publication to dispute, on SQLite or on three real etcd nodes.

    uv run benchmarks/claims_demo.py            # SQLite, five member processes
    uv run benchmarks/claims_demo.py --etcd     # three nodes over mutual TLS (fetches etcd if missing)

The owner marks a small network on random images and publishes it. An attacker adds noise to a copy, marks it
with a second key, and publishes and claims it. The owner claims it as well, five council members vote, and
the dispute is resolved. Each job runs in a separate process, as typed in docs/claims.md. The exit code is 0
if owner and attacker receive the expected standings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import torch

import mtlsign
from mtlsign.models import architectures
from mtlsign.storage.locations import open_storage
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import from_tensors
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret

#: Settings of both embeddings. The attacker takes fewer steps, as more would cost the copied model accuracy.
SETTINGS: dict[str, dict[str, Any]] = {
    "owner": {"phase2.steps": 200, "perturbation.noise_sigma": 0.3, "phase2.lr": 0.005},
    "attacker": {"phase2.steps": 60, "perturbation.noise_sigma": 0.05, "phase2.lr": 0.002},
}
ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = {"channels": 1, "classes": 4, "width": 16, "stem": "stock"}
MEMBERS = 5


@dataclass(frozen=True)
class Marked:
    """Files of one marked network: identity, kit and model folder."""

    identity: Path
    kit: Path
    model: Path


def mark(folder: Path, name: str, tensors: dict[str, Any] | None) -> Marked:
    """Mark a small network and write its files.

    Args:
        folder: folder of the demonstration.
        name: `owner` or `attacker`.
        tensors: weights to start from; None for a new network.
    """
    identity, path = Identity.generate(), folder / f"{name}.json"
    identity.save(path, None)
    architecture = architectures.architecture_for("resnet18", **ARCHITECTURE)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = architectures.build(architecture)
    if tensors is not None:
        model.load_state_dict(tensors)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, 24, 24)[y] + 0.3 * torch.randn(120, 1, 24, 24)
    options = {"key_size": 512, "phase1.batch": 16, "phase2.batch": 16, **SETTINGS[name]}
    result = mtlsign.embed(
        model, from_tensors(x, y), trained=True, identity=identity, architecture=architecture, **options
    )
    result.save(open_storage(str(folder / name)), EncryptionSecret.from_kit_key(identity.kit_key))
    return Marked(path, Path(str(result.result["kit"])), Path(str(result.result["model_path"])))


class Jobs:
    """Runs the jobs of the claim protocol on one ledger."""

    def __init__(self, folder: Path, ledger: str, flags: Sequence[object]) -> None:
        self.folder = folder
        self._flags = ["--ledger", ledger, *map(str, flags)]
        self._env = os.environ | {"MTLSIGN_HOME": str(folder / "home")}

    def run(self, name: str, *arguments: object) -> Any:
        """Run a job on the ledger and return its JSON document."""
        return json.loads(self.run_plain(name, *arguments, *self._flags, "--json"))

    def run_plain(self, name: str, *arguments: object) -> str:
        """Run a job with these arguments alone and return its standard output."""
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)]
        process = subprocess.run(command, capture_output=True, text=True, env=self._env)
        if process.returncode:
            raise SystemExit(f"{name}: {process.stderr}")
        return process.stdout

    def run_council(self, members: Sequence[Path]) -> None:
        """Run one round of each member, all at the same time, and print the votes."""
        command = [sys.executable, str(ROOT / "jobs" / "council.py"), "--once", "--json", *self._flags]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes = [
            subprocess.Popen([*command, "--identity", str(member)], text=True, env=self._env, **pipes)
            for member in members
        ]
        for process in processes:
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"council: {err}")
            for vote in json.loads(out)["votes"]:
                count = f"{vote['matches']} of {vote['n']}"
                print(f"  vote on entry {vote['claim']}: {vote['status']}, {count}")


def publish(jobs: Jobs, author: str, files: Marked) -> None:
    """Publish a marked model and print the entry's number."""
    entry = jobs.run("publish", "--owner", files.identity, "--kit", files.kit, "--model", files.model)
    print(f"{author} publishes entry {entry['index']}")


def add_noise(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the weights with a little noise."""
    return {
        name: t + 0.02 * t.std() * torch.randn_like(t) if t.is_floating_point() and t.numel() > 1 else t
        for name, t in tensors.items()
    }


def run_demo(jobs: Jobs, folder: Path) -> bool:
    """Run the protocol; return True if the standings are as expected."""
    members = [folder / f"member{i}.json" for i in range(MEMBERS)]
    for member in members:
        Identity.generate().save(member, None)
    owner = mark(folder, "owner", None)
    member_flags = [text for member in members for text in ("--members", member)]
    jobs.run("ledger", "create", "--owner", owner.identity, *member_flags)
    publish(jobs, "owner", owner)
    jobs.run_council(members)
    print("the attacker copies the model, adds noise, and embeds a second watermark")
    copied = parse_safetensors((owner.model / "model.safetensors").read_bytes())
    attacker = mark(folder, "attacker", add_noise(copied))
    publish(jobs, "attacker", attacker)
    jobs.run_council(members)
    suspect = folder / "suspect.safetensors"
    suspect.write_bytes(
        serialize_safetensors(parse_safetensors((attacker.model / "model.safetensors").read_bytes()))
    )
    owner_files = ("--owner", owner.identity, "--kit", owner.kit)
    jobs.run("claim", *owner_files, "--model", suspect, "--confirmation-timeout", "0")  # registers the model
    jobs.run_council(members)
    claims = [
        jobs.run("claim", "--owner", files.identity, "--kit", files.kit, "--model", suspect)
        for files in (owner, attacker)
    ]
    owner_claim, attacker_claim = (claim["claim"] for claim in claims)
    print("claims at entries", *(claim["index"] for claim in claims))
    jobs.run_council(members)
    jobs.run_council(members)
    result = jobs.run("dispute", "--claims", owner_claim, "--claims", attacker_claim)
    for standing in result["standings"]:
        author = "owner" if standing["claim"] == owner_claim else "attacker"
        print(f"{author}: {standing['standing']}, votes {standing['numbers']['votes']}")
        print(f"  {standing['sentence']}")
    print(*(f"edge: {edge['kind']}" for edge in result["edges"]))
    check_bundle(jobs, owner_claim)
    expected = {owner_claim: "supported", attacker_claim: "inherited"}
    return bool(result["statuses"] == expected)


def check_bundle(jobs: Jobs, claim: str) -> None:
    """Export a claim with the ledger's checkpoint, and verify the bundle without the ledger."""
    head, bundle = jobs.folder / "head.txt", jobs.folder / "claim.zip"
    jobs.run("ledger", "head", "--output", head)
    jobs.run("ledger", "bundle", "--claim", claim, "--output", bundle)
    print(jobs.run_plain("verify", "--bundle", bundle, "--head", head))


def main() -> int:
    """Parse the command line and run the demonstration; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--etcd", action="store_true", help="three etcd nodes instead of one SQLite file")
    parser.add_argument("--folder", type=Path, help="keep all files here [a folder that is deleted]")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="mtlsign-claims-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        ledger, flags = f"sqlite:///{folder}/ledger.db", []
        if options.etcd:
            from tests.helpers import etcd_cluster

            (folder / "etcd").mkdir()
            cluster = stack.enter_context(etcd_cluster.running(folder / "etcd"))
            tls, ledger = cluster.tls, cluster.uri()
            flags = ["--etcd-ca", tls.ca, "--etcd-cert", tls.cert, "--etcd-key", tls.key]
            flags += ["--archive", folder / "archive"]
        return 0 if run_demo(Jobs(folder, ledger, flags), folder) else 1


if __name__ == "__main__":
    sys.exit(main())
