"""publish → steal → register → claim → five votes → tally → lineage, on SQLite or on three real etcd nodes.

    uv run benchmarks/claims_demo.py            # SQLite, five member processes
    uv run benchmarks/claims_demo.py --etcd     # three nodes over mutual TLS (Debian's etcd, fetched if
    need be)

A small network on random images is marked in seconds; a thief adds noise, marks it again with a key of his
own, and claims it back. Each job runs as a process of its own, exactly as typed in
docs/claims.md. The exit code is 0 when owner and thief stand as they should.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
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

#: The owner marks with care; the thief hurries, because more steps cost a stolen network its task.
HOW: dict[str, dict[str, Any]] = {
    "owner": {"steps": 200, "noise": 0.3, "wm_lr": 0.005},
    "thief": {"steps": 60, "noise": 0.05, "wm_lr": 0.002},
}
ROOT = Path(__file__).resolve().parent.parent
GRAPH = {"channels": 1, "classes": 4, "width": 16, "stem": "stock"}


def mark(folder: Path, name: str, tensors: dict[str, Any] | None) -> tuple[Path, Path, Path]:
    """Mark a small network (a fresh one, or a stolen one's tensors): identity file, kit, model folder."""
    identity, path = Identity.generate(), folder / f"{name}.json"
    identity.save(path, None)
    graph = architectures.architecture_for("resnet18", **GRAPH)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = architectures.build(graph)
    if tensors is not None:
        model.load_state_dict(tensors)
    y = torch.arange(120) % 4
    x = torch.rand(4, 1, 24, 24)[y] + 0.3 * torch.randn(120, 1, 24, 24)
    done = mtlsign.embed(
        model, from_tensors(x, y), trained=True, identity=identity, graph=graph, key_size=512,
        batch=16, primary_batch=16, **HOW[name],
    )  # fmt: skip
    done.save(open_storage(str(folder / name)), EncryptionSecret.from_kit_key(identity.kit_key))
    return path, Path(str(done.result["kit"])), Path(str(done.result["model_path"]))


def main() -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--etcd", action="store_true", help="three etcd nodes instead of one SQLite file")
    parser.add_argument("--folder", type=Path, help="keep everything here [a folder that is deleted]")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="mtlsign-claims-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        ledger, more = f"sqlite:///{folder}/ledger.db", []
        if options.etcd:
            from tests.helpers import etcd_cluster

            (folder / "etcd").mkdir()
            cluster = stack.enter_context(etcd_cluster.running(folder / "etcd"))
            tls, ledger = cluster.tls, cluster.uri()
            more = [
                "--etcd-ca",
                tls.ca,
                "--etcd-cert",
                tls.cert,
                "--etcd-key",
                tls.key,
                "--archive",
                folder / "archive",
            ]
        env = os.environ | {"MTLSIGN_HOME": str(folder / "home")}

        def job(name: str, *argv: object) -> Any:
            command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, argv), "--ledger", ledger]
            command += [*map(str, more), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            return json.loads(done.stdout)

        members = [folder / f"member{i}.json" for i in range(5)]
        for member in members:
            Identity.generate().save(member, None)

        def council() -> None:
            """Five processes at once; a lost race for the store is simply tried again by the backend."""
            command = [sys.executable, str(ROOT / "jobs" / "council.py"), "--once", "--json"]
            command += ["--ledger", ledger, *map(str, more), "--identity"]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running = [
                subprocess.Popen([*command, str(member)], text=True, env=env, **pipes) for member in members
            ]
            for process in running:
                out, err = process.communicate()
                if process.returncode:
                    raise SystemExit(f"council: {err}")
                for vote in json.loads(out)["votes"]:
                    print(
                        f"  vote on entry {vote['claim']}: {vote['status']}, {vote['matches']} of {vote['n']}"
                    )

        owner, kit, model = mark(folder, "owner", None)
        job("ledger", "found", "--owner", owner, "--members", ",".join(map(str, members)))
        print("published as entry", job("publish", "--owner", owner, "--kit", kit, "--model", model)["index"])
        council()
        print("stolen: noise, then a second mark by the thief")
        stolen = parse_safetensors((model / "model.safetensors").read_bytes())
        noisy = {
            n: t + 0.02 * t.std() * torch.randn_like(t) if t.is_floating_point() and t.numel() > 1 else t
            for n, t in stolen.items()
        }
        thief, thief_kit, remarked = mark(folder, "thief", noisy)
        print(
            "thief publishes entry",
            job("publish", "--owner", thief, "--kit", thief_kit, "--model", remarked)["index"],
        )
        council()
        suspect = folder / "suspect.safetensors"
        suspect.write_bytes(
            serialize_safetensors(parse_safetensors((remarked / "model.safetensors").read_bytes()))
        )
        ours = job("claim", "--owner", owner, "--kit", kit, "--model", suspect)
        theirs = job("claim", "--owner", thief, "--kit", thief_kit, "--model", suspect)
        print("claims at entries", ours["index"], theirs["index"])
        council()
        council()
        result = job("dispute", "--claims", f"{ours['claim']},{theirs['claim']}")
        for standing in result["standings"]:
            who = "owner" if standing["claim"] == ours["claim"] else "thief"
            print(f"{who}: {standing['standing']}, votes {standing['numbers']['votes']}")
            print(f"  {standing['sentence']}")
        print(*(f"edge: {edge['kind']}" for edge in result["edges"]))
        job("ledger", "head", "--out", folder / "head.txt")
        job("ledger", "bundle", "--claim", ours["claim"], "--out", folder / "claim.zip")
        command = [sys.executable, str(ROOT / "jobs" / "verify.py"), "--bundle", str(folder / "claim.zip")]
        command += ["--head", str(folder / "head.txt")]
        checked = subprocess.run(command, capture_output=True, text=True, env=env)
        print(checked.stdout or checked.stderr)
        wanted = {ours["claim"]: "in_the_weights", theirs["claim"]: "inherited"}
        return 0 if result["statuses"] == wanted and checked.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
