"""The whole service under load: every answer checked, stages, memory, throughput against bare forwards.

    python -m benchmarks.service                     # 1,000 claims, 20 models in a real S3 on loopback
    python -m benchmarks.service --quick             # 60 claims, 4 models
    python -m benchmarks.service --kill verifier     # or ingress: killed under that load
    python -m benchmarks.service --only further      # one process: a further claim on a model that is here

It marks one network, writes copies that differ in an untapped tensor (half of the models) and others that are
unmarked, and starts `jobs/serve.py` as the README says. Everything runs on the cores of this process's
affinity, S3, client and ingress too, so `throughput` counts what they cost (`taskset -c 1 python -m …`):
CPU seconds of as many bare tapped forwards ÷ CPU seconds of all these processes, which a busy machine
disturbs little; beside it the same by the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import mtlsign  # noqa: E402
from benchmarks.measure import hardware  # noqa: E402
from mtlsign.config.service import ServiceSettings  # noqa: E402
from mtlsign.models import architectures  # noqa: E402
from mtlsign.models.taps import forward_to_taps  # noqa: E402
from mtlsign.service.auth import tokens  # noqa: E402
from mtlsign.service.client import Client, make_claim  # noqa: E402
from mtlsign.service.database import Database  # noqa: E402
from mtlsign.service.verifier.claim_bundle import take_bundle  # noqa: E402
from mtlsign.service.verifier.detectors import detector_for_claim  # noqa: E402
from mtlsign.service.verifier.verifier import OpenedClaimRef, VerificationTask, Verifier  # noqa: E402
from mtlsign.storage.base import Storage  # noqa: E402
from mtlsign.storage.locations import open_storage  # noqa: E402
from mtlsign.storage.model_folder import model_bytes, write_model  # noqa: E402
from mtlsign.tasks import from_tensors  # noqa: E402
from mtlsign.watermark.carriers import qr  # noqa: E402
from mtlsign.watermark.keys.identity import Identity  # noqa: E402
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec  # noqa: E402
from mtlsign.watermark.keys.spec import make_spec  # noqa: E402
from mtlsign.watermark.verification.reference import make_reference  # noqa: E402


@dataclass
class Goods:
    """One marked network, its right key and others."""

    graph: dict[str, object]
    tensors: dict[str, Tensor]
    right: KeyOpening
    others: list[KeyOpening]
    reference: bytes

    @classmethod
    def make(cls, width: int, n: int, side: int, keys: int, steps: int) -> Goods:
        """Mark a network well enough for 120 bits, no more, or not at all: a claim costs the same."""
        graph = architectures.architecture_for("resnet18", channels=1, classes=4, width=width, stem="stock")
        torch.manual_seed(0)
        model, gen = architectures.build(graph).eval(), torch.Generator().manual_seed(0)
        owner = Identity.generate()
        if not steps:
            kept = make_reference(model, ["layer1"], torch.zeros(1, 1, side, side))
            fields = {
                "name": "benchmark", "n": n, "carrier": qr.make_carrier(n, 1, side, side), "taps": ["layer1"],
                "head": {"kind": "keyed"}, "statistic": "count", "graph": graph, "reference": kept.digest,
            }  # fmt: skip
            right, *others = [sign_spec(owner, make_spec(**fields)) for _ in range(keys + 1)]
            return cls(graph, dict(model.state_dict()), right, others, kept.data)
        y = torch.arange(64) % 4
        x = torch.rand(4, 1, side, side, generator=gen)[y] + 0.3 * torch.randn(
            64, 1, side, side, generator=gen
        )
        done = mtlsign.embed(
            model, from_tensors(x, y), trained=True, identity=owner, graph=graph, key_size=n, steps=steps,
            lambda2=0, batch=16, primary_batch=16, wm_lr=0.01,
        )  # fmt: skip
        assert done.kit is not None
        fields = json.loads(done.kit.opening.spec)
        others = [sign_spec(owner, make_spec(**fields | {"nonce": f"{i:064x}"})) for i in range(keys)]
        return cls(graph, dict(done.tensors), done.kit.opening, others, done.kit.reference)

    def write(self, place: Storage, count: int, size: int) -> list[str]:
        """`count` models, every second one marked; their names below `place`."""
        names = []
        for i in range(count):
            torch.manual_seed(i)
            fresh = {k: v.clone() for k, v in architectures.build(self.graph).state_dict().items()}
            tensors = fresh if i % 2 else self.tensors | {"fc.weight": fresh["fc.weight"]}
            names.append(f"models/{write_model(place, tensors, {}, '')}")
        nan = self.tensors | {"conv1.weight": torch.full_like(self.tensors["conv1.weight"], float("nan"))}
        place.write("nan.safetensors", model_bytes(nan))
        place.write("junk.safetensors", b"\x80\x04 no model")
        place.write("huge.safetensors", b"x" * (size + 1))
        return names

    def claims(self, count: int, base: str, names: Sequence[str]) -> tuple[list[Any], list[str]]:
        """Mixed claims, one in twenty broken, and the right answers."""
        dice, asked, wanted = random.Random(0), [], []
        broken: list[Any] = [
            ("bad-bundle", lambda c: c["bundle"].update(reference="AAAA")),
            ("kit-refused", lambda c: c["bundle"].update(kit="x")),
            ("bad-claim", lambda c: c.pop("bundle")),
            ("pointer-refused", lambda c: c.update(model="file:///etc/passwd")),
            ("unreachable", lambda c: c.update(model=f"{base}/none.safetensors")),
            ("not-a-model", lambda c: c.update(model=f"{base}/junk.safetensors")),
            ("too-large", lambda c: c.update(model=f"{base}/huge.safetensors")),
            ("wrong-digest", lambda c: c.update(sha256="0" * 64)),
            ("not_verifiable", lambda c: c.update(model=f"{base}/nan.safetensors")),
        ]
        for i in range(count):
            which, right = dice.randrange(len(names)), dice.random() < 0.5
            opening = self.right if right else dice.choice(self.others)
            claim = copy.deepcopy(make_claim(f"{base}/{names[which]}", opening, self.reference))
            answer = "accepted" if right and which % 2 == 0 else "rejected"
            if i % 20 == 7:
                answer, spoil = broken[(i // 20) % len(broken)]
                spoil(claim)
            asked.append(claim)
            wanted.append(answer)
        return asked, wanted


def bare(goods: Goods, repeats: int, pause: float = 0.0, over: threading.Event | None = None) -> list[float]:
    """CPU seconds of plain forwards of a key set to the last tap, channels last: the least a claim costs.

    With `pause` beside the load until it is `over`: on a shared machine CPU seconds too depend on neighbours.
    """
    detector = detector_for_claim(take_bundle(make_claim("", goods.right, goods.reference)["bundle"]))
    net = architectures.build(goods.graph).train().to(memory_format=torch.channels_last)
    found: list[float] = []
    torch.set_num_threads(1)  # OpenMP keeps the number for each thread
    with torch.no_grad():
        while len(found) < repeats + 2 and not (over and over.wait(pause)):
            start = time.thread_time()
            forward_to_taps(net, detector.images, detector.spec.taps)
            found.append(time.thread_time() - start)
    return found[2:] or found


def further(goods: Goods, folder: Path, repeats: int) -> dict[str, float]:
    """A further claim, each with a key not seen before, on a model that is here; in turn, bare forwards."""
    (folder / "m.safetensors").write_bytes(model_bytes(goods.tensors))
    verifier = Verifier(ServiceSettings.of({"state": folder / "state", "allow": f"file://{folder}"}))
    pairs = []
    for opening in goods.others[: repeats + 2]:
        data = json.dumps(make_claim("", opening, goods.reference)["bundle"]).encode()
        task = VerificationTask(f"file://{folder}/m.safetensors", None, (OpenedClaimRef(data),))
        start = time.process_time()
        assert verifier.answer(task).outcomes[0]["verdict"]["status"] == "rejected"
        pairs.append((time.process_time() - start, statistics.median(bare(goods, 3))))
    ratios = sorted(a / b for a, b in pairs[2:])
    found = {
        "further_claim_cpu_s": statistics.median(a for a, _ in pairs[2:]),
        "forward_cpu_s": statistics.median(b for _, b in pairs[2:]),
        "further_over_forward": statistics.median(ratios),
    }
    return found | {"low": ratios[0], "high": ratios[-1], "pairs": len(ratios)}


def memory(pid: int, name: str) -> float:
    """MiB from a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


PARTS = {
    "Replica:mtlsign:verify": "verifier",
    "Replica:mtlsign:gate": "ingress",
    "Proxy": "proxy",
    "weed": "s3",
}


def cpu() -> Counter[str]:
    """CPU seconds so far of this process and of all that descend from it and live, by what they are."""
    parents: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            used = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with children that ended
            parents.setdefault(int(fields[1]), []).append((int(entry.parent.name), used))
    todo, found = [os.getpid()], Counter({"client": time.process_time()})
    while todo:
        for pid, used in parents.get(todo.pop(), []):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                found[next((kind for part, kind in PARTS.items() if part in line), "ray")] += used
            todo.append(pid)
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    found = sorted(values)
    return {"p50": statistics.median(found), "p99": found[min(len(found) - 1, int(0.99 * len(found)))]}


def replicas(job: Any, name: str) -> list[int]:
    """Process ids of a deployment's replicas."""
    return [pid for pid, said in job.family().items() if f"ServeReplica:mtlsign:{name}" in said]


def said(result: dict[str, Any]) -> str:
    """A result in one word."""
    if "verdict" in result:
        return str(result["verdict"]["status"])
    return str(result["problem"]["type"]).rpartition(":")[2]


def stages(logs: Path) -> dict[str, dict[str, float]]:
    """Seconds by stage from the service's own log: fetch and load of a task, the rest of one claim."""
    found: dict[str, list[float]] = {}
    for path in logs.glob("worker-*.err"):
        for line in path.read_text(errors="replace").splitlines():
            if '"event": "asked"' in line and line.startswith("{"):
                event = json.loads(line)
                for stage, seconds in event["seconds"].items():
                    share = event["claims"] if stage in ("prepare", "forward") else 1
                    if seconds:
                        found.setdefault(stage, []).append(seconds / share)
    return {stage: quantiles(values) for stage, values in found.items()}


def under_load(a: argparse.Namespace, goods: Goods, folder: Path) -> dict[str, Any]:
    """Start S3 and the service, send all claims, check every answer."""
    from tests.helpers import seaweedfs_server
    from tests.helpers.job_harness import Jobs

    for name in ("s3", "goods"):
        (folder / name).mkdir()
    jobs = Jobs(folder / "jobs", folder)
    with seaweedfs_server.running(folder / "s3") as s3:
        os.environ.update(s3.env)
        names = goods.write(
            open_storage(f"s3://{s3.bucket}/goods", endpoint=s3.endpoint), a.models, a.limit << 20
        )
        base = f"s3://{s3.bucket}/goods"
        asked, wanted = goods.claims(a.claims, base, names)
        (port,) = seaweedfs_server.free_ports(1)
        started = time.perf_counter()
        job = jobs.python(
            "jobs/serve.py", "--port", str(port), "--verifiers", str(a.verifiers),
            "--state", str(folder / "state"), "--allow", base, "--endpoint", s3.endpoint,
            "--max-model-mb", str(a.limit), "--pointer-s", "600",
            PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT), **s3.env,
        )  # fmt: skip
        try:
            job.until(lambda: "answers" in job.out, 900)
            result: dict[str, Any] = {"start_s": time.perf_counter() - started}
            store = Database(folder / "state" / "service.sqlite")
            token = tokens.issue(store, "benchmark", ["verify"], 24)
            before = {n: [memory(p, "VmRSS") for p in replicas(job, n)] for n in ("gate", "verify")}
            result |= send(a, goods, f"http://127.0.0.1:{port}", token, asked, wanted, job)
            for n in ("gate", "verify"):
                pids = replicas(job, n)
                result[f"{n}_mib"] = {"start": before[n], "peak": [memory(p, "VmHWM") for p in pids]}
            result["stages"] = stages(folder / "ray" / "session_latest" / "logs")
            forwards, cores = sum(w in ("accepted", "rejected") for w in wanted), len(os.sched_getaffinity(0))
            result |= {"forwards": forwards, "cores": cores}
            result["throughput"] = forwards * result["beside_cpu_s"] / result["cpu_s"]
            result["throughput_wall"] = forwards * result["beside_cpu_s"] / (result["seconds"] * cores)
            return result
        finally:
            jobs.end()


def send(
    a: argparse.Namespace,
    goods: Goods,
    url: str,
    token: str,
    asked: Sequence[Any],
    wanted: Sequence[str],
    job: Any,
) -> dict[str, Any]:
    """All claims over `--clients` connections, perhaps with a process killed every few seconds."""
    parts = [list(asked[at : at + a.batch]) for at in range(0, len(asked), a.batch)]
    over, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        while killed < a.kills and not over.wait(a.every):
            for pid in replicas(job, {"verifier": "verify", "ingress": "gate"}[a.kill])[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1

    def one(part: list[Any]) -> tuple[float, list[dict[str, Any]]]:
        with Client(url, token, patience_s=3600) as client:
            start = time.perf_counter()
            results = client.verify(part, wait_s=30)
            return time.perf_counter() - start, results

    beside: list[float] = []
    killer = threading.Thread(target=kill, daemon=True)
    sampler = threading.Thread(target=lambda: beside.extend(bare(goods, 10**6, 1.0, over)))
    sampler.start()
    if a.kill:
        killer.start()
    start, used = time.perf_counter(), cpu()
    with ThreadPoolExecutor(a.clients) as pool:
        done = list(pool.map(one, parts))
    seconds = time.perf_counter() - start
    after = cpu()
    over.set()
    sampler.join()
    spent = {kind: after[kind] - used[kind] for kind in after}
    spent["client"] -= sum(beside)
    answers = [said(result) for _, results in done for result in results]
    wrong = [(i, w, got) for i, (w, got) in enumerate(zip(wanted, answers, strict=False)) if w != got]
    return {
        "claims": len(asked), "answers": len(answers), "wrong": len(wrong), "first_wrong": wrong[:5],
        "kinds": dict(Counter(answers)), "killed": killed, "seconds": seconds, "cpu_by": spent,
        "cpu_s": sum(spent.values()), "claims_per_s": len(asked) / seconds,
        "request_s": quantiles([t for t, _ in done]), "beside_cpu_s": statistics.median(beside),
    }  # fmt: skip


def main() -> int:
    """Run and print JSON; exit code 1 when an answer is wrong or missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("claims", 1000, "claims"), ("models", 20, "models in S3"), ("keys", 20, "wrong keys"),
        ("width", 16, "of the ResNet-18"), ("n", 1024, "bits of a key"), ("side", 28, "pixels"),
        ("batch", 50, "claims in a request"), ("clients", 4, "requests at a time"),
        ("verifiers", 1, "replicas"), ("repeats", 9, "pairs for a further claim"),
        ("limit", 64, "MiB that a model may have"), ("steps", 100, "of marking"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--kill", choices=["verifier", "ingress"], help="what is killed under the load")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between kills [10]")
    parser.add_argument("--kills", type=int, default=2, help="how often [2]")
    parser.add_argument("--only", choices=["further", "load"], help="one half")
    parser.add_argument("--quick", action="store_true", help="60 claims, 4 models")
    a = parser.parse_args()
    if a.quick:
        a.claims, a.models, a.keys, a.batch, a.repeats = 60, 4, 6, 15, 3
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, then too
    with tempfile.TemporaryDirectory(prefix="mtlsign-", ignore_cleanup_errors=True) as temporary:
        keys = max(a.keys, a.repeats + 2)
        goods = Goods.make(a.width, a.n, a.side, keys, a.steps if a.only != "further" else 0)
        result: dict[str, Any] = {"hardware": hardware()}
        if a.only != "load":
            result |= further(goods, Path(temporary), a.repeats)
        if a.only != "further":
            result |= under_load(a, goods, Path(temporary))
    print(json.dumps(result, indent=1))
    return int(result.get("wrong", 0) > 0 or result.get("answers", 0) != result.get("claims", 0))


if __name__ == "__main__":
    sys.exit(main())
