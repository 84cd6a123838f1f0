"""The whole service under load: every answer is checked; stages, memory and throughput are measured.

    python -m benchmarks.service                     # 1,000 claims, 20 models in a real S3 on loopback
    python -m benchmarks.service --quick             # 60 claims, 4 models
    python -m benchmarks.service --kill verifier     # or ingress: killed under that load
    python -m benchmarks.service --only further      # one process: a further claim on a cached model

It embeds a watermark into one network. Half of the models are copies of it that differ in a tensor without
taps, the others are unmarked. It starts `jobs/serve.py` as the README describes. Everything runs on the
cores of this process's affinity (`taskset -c 1 python -m …`), including S3, client and ingress, so
`throughput` includes their cost: CPU seconds of as many bare forward passes to the taps, divided by the CPU
seconds of all these processes. Other load on the machine affects this ratio little; `throughput_wall` is the
same by the wall clock.
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
from mtlsign.service.verifier.claim_bundle import parse_bundle  # noqa: E402
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

#: Text that `jobs/serve.py` prints when the service answers.
READY = "answers"


@dataclass
class ServiceFixtures:
    """One marked network, the opening of its key, and openings of other keys."""

    architecture: dict[str, object]
    tensors: dict[str, Tensor]
    right: KeyOpening
    others: list[KeyOpening]
    reference: bytes

    @classmethod
    def make(cls, width: int, n: int, side: int, keys: int, steps: int) -> ServiceFixtures:
        """Embed a watermark with about 120 bits of evidence, or none (`steps` 0): a claim costs the same."""
        architecture = architectures.architecture_for(
            "resnet18", channels=1, classes=4, width=width, stem="stock"
        )
        torch.manual_seed(0)
        model, gen = architectures.build(architecture).eval(), torch.Generator().manual_seed(0)
        owner = Identity.generate()
        if not steps:
            reference = make_reference(model, ["layer1"], torch.zeros(1, 1, side, side))
            fields = {
                "name": "benchmark", "n": n, "carrier": qr.make_carrier(n, 1, side, side), "taps": ["layer1"],
                "head": {"kind": "keyed"}, "statistic": "count", "architecture": architecture,
                "reference": reference.digest,
            }  # fmt: skip
            right, *others = [sign_spec(owner, make_spec(**fields)) for _ in range(keys + 1)]
            return cls(architecture, dict(model.state_dict()), right, others, reference.raw_bytes)
        y = torch.arange(64) % 4
        noise = torch.randn(64, 1, side, side, generator=gen)
        x = torch.rand(4, 1, side, side, generator=gen)[y] + 0.3 * noise
        options = {
            "head": "keyed", "key_size": n, "lambda2": 0, "phase1.batch": 16, "phase2.steps": steps,
            "phase2.batch": 16, "phase2.lr": 0.01,
        }  # fmt: skip
        result = mtlsign.embed(
            model, from_tensors(x, y), trained=True, identity=owner, architecture=architecture, **options
        )
        assert result.kit is not None
        fields = json.loads(result.kit.opening.spec)
        others = [sign_spec(owner, make_spec(**fields | {"nonce": f"{i:064x}"})) for i in range(keys)]
        kit = result.kit
        return cls(architecture, dict(result.tensors), kit.opening, others, kit.reference)

    def write(self, storage: Storage, count: int, size: int) -> list[str]:
        """Write `count` models, every second one marked, and three invalid ones; return the models' names."""
        names = []
        for i in range(count):
            torch.manual_seed(i)
            fresh = {k: v.clone() for k, v in architectures.build(self.architecture).state_dict().items()}
            tensors = fresh if i % 2 else self.tensors | {"fc.weight": fresh["fc.weight"]}
            names.append(f"models/{write_model(storage, tensors, {}, '')}")
        nan = self.tensors | {"conv1.weight": torch.full_like(self.tensors["conv1.weight"], float("nan"))}
        storage.write("nan.safetensors", model_bytes(nan))
        storage.write("junk.safetensors", b"\x80\x04 no model")
        storage.write("huge.safetensors", b"x" * (size + 1))
        return names

    def claims(self, count: int, base: str, names: Sequence[str]) -> tuple[list[Any], list[str]]:
        """Return mixed claims, one in twenty broken, and the right results."""
        rng, claims, expected = random.Random(0), [], []
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
            model, is_right = rng.randrange(len(names)), rng.random() < 0.5
            opening = self.right if is_right else rng.choice(self.others)
            claim = copy.deepcopy(make_claim(f"{base}/{names[model]}", opening, self.reference))
            result = "accepted" if is_right and model % 2 == 0 else "rejected"
            if i % 20 == 7:
                result, break_claim = broken[(i // 20) % len(broken)]
                break_claim(claim)
            claims.append(claim)
            expected.append(result)
        return claims, expected


def bare_forward(
    fixtures: ServiceFixtures, repeats: int, pause: float = 0.0, stop: threading.Event | None = None
) -> list[float]:
    """Return CPU seconds of plain forward passes of a key set to the last tap: the least cost of a claim.

    Args:
        fixtures: the network and key.
        repeats: number of passes.
        pause: seconds between two passes, for measurements under load: CPU seconds depend on other processes.
        stop: ends the measurement.
    """
    bundle = make_claim("", fixtures.right, fixtures.reference)["bundle"]
    detector = detector_for_claim(parse_bundle(bundle))
    net = architectures.build(fixtures.architecture).train().to(memory_format=torch.channels_last)
    seconds: list[float] = []
    torch.set_num_threads(1)  # OpenMP stores the number for each thread
    with torch.no_grad():
        while len(seconds) < repeats + 2 and not (stop and stop.wait(pause)):
            start = time.thread_time()
            forward_to_taps(net, detector.feature_readout.inputs, detector.spec.taps)
            seconds.append(time.thread_time() - start)
    return seconds[2:] or seconds


def further_claim(fixtures: ServiceFixtures, folder: Path, repeats: int) -> dict[str, float]:
    """Measure further claims on a cached model, each with a new key, alternating with bare forward passes."""
    (folder / "m.safetensors").write_bytes(model_bytes(fixtures.tensors))
    settings = {"state_dir": folder / "state", "allowed_locations": [f"file://{folder}"]}
    verifier = Verifier(ServiceSettings.of(settings))
    pairs = []
    for opening in fixtures.others[: repeats + 2]:
        data = json.dumps(make_claim("", opening, fixtures.reference)["bundle"]).encode()
        task = VerificationTask(f"file://{folder}/m.safetensors", None, (OpenedClaimRef(data),))
        start = time.process_time()
        assert verifier.answer(task).outcomes[0]["verdict"]["status"] == "rejected"
        pairs.append((time.process_time() - start, statistics.median(bare_forward(fixtures, 3))))
    ratios = sorted(a / b for a, b in pairs[2:])
    return {
        "further_claim_cpu_s": statistics.median(a for a, _ in pairs[2:]),
        "forward_cpu_s": statistics.median(b for _, b in pairs[2:]),
        "further_over_forward": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "pairs": len(ratios),
    }


def memory_mib(pid: int, name: str) -> float:
    """Return a field of a process's status in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


#: Part of a command line → kind of process.
PROCESS_KINDS = {
    "Replica:mtlsign:verifier": "verifier",
    "Replica:mtlsign:ingress": "ingress",
    "Proxy": "proxy",
    "weed": "s3",
}


def cpu_seconds() -> Counter[str]:
    """Return CPU seconds of this process and its living descendants by kind."""
    children: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            used = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # includes ended children
            children.setdefault(int(fields[1]), []).append((int(entry.parent.name), used))
    todo, seconds = [os.getpid()], Counter({"client": time.process_time()})
    while todo:
        for pid, used in children.get(todo.pop(), []):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                kind = next((kind for part, kind in PROCESS_KINDS.items() if part in line), "ray")
                seconds[kind] += used
            todo.append(pid)
    return seconds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def replicas(job: Any, name: str) -> list[int]:
    """Return the process ids of a deployment's replicas."""
    return [pid for pid, line in job.process_tree().items() if f"ServeReplica:mtlsign:{name}" in line]


def status_of(result: dict[str, Any]) -> str:
    """Return the status of a verdict or the kind of a problem."""
    if "verdict" in result:
        return str(result["verdict"]["status"])
    return str(result["problem"]["type"]).rpartition(":")[2]


def stages(logs: Path) -> dict[str, dict[str, float]]:
    """Return seconds by stage from the log: fetch and load of a task, the other stages of a claim."""
    values: dict[str, list[float]] = {}
    for path in logs.glob("worker-*.err"):
        for line in path.read_text(errors="replace").splitlines():
            if '"event": "verification_task"' in line and line.startswith("{"):
                event = json.loads(line)
                for stage, seconds in event["seconds"].items():
                    share = event["claims"] if stage in ("prepare", "forward") else 1
                    if seconds:
                        values.setdefault(stage, []).append(seconds / share)
    return {stage: quantiles(seconds) for stage, seconds in values.items()}


def measure_under_load(
    options: argparse.Namespace, fixtures: ServiceFixtures, folder: Path
) -> dict[str, Any]:
    """Start S3 and the service, send all claims and check every answer."""
    from tests.helpers import seaweedfs_server
    from tests.helpers.job_harness import JobLauncher

    for name in ("s3", "models"):
        (folder / name).mkdir()
    jobs = JobLauncher(folder / "jobs", folder)
    with seaweedfs_server.running(folder / "s3") as s3:
        os.environ.update(s3.env)
        base = f"s3://{s3.bucket}/models"
        names = fixtures.write(open_storage(base, endpoint=s3.endpoint), options.models, options.limit << 20)
        claims, expected = fixtures.claims(options.claims, base, names)
        (port,) = seaweedfs_server.free_ports(1)
        started = time.perf_counter()
        job = jobs.python(
            "jobs/serve.py", "--port", str(port), "--min-replicas", str(options.replicas),
            "--state-dir", str(folder / "state"), "--allowed-locations", base, "--endpoint", s3.endpoint,
            "--max-model-mb", str(options.limit), "--location-cache-ttl-s", "600",
            PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT), **s3.env,
        )  # fmt: skip
        try:
            job.until(lambda: READY in job.out, 900)
            result: dict[str, Any] = {"start_s": time.perf_counter() - started}
            token = tokens.issue(Database(folder / "state" / "service.sqlite"), "benchmark", ["verify"], 24)
            kinds = ("ingress", "verifier")
            before = {kind: [memory_mib(p, "VmRSS") for p in replicas(job, kind)] for kind in kinds}
            url = f"http://127.0.0.1:{port}"
            result |= send(options, fixtures, url, token, claims, expected, job)
            for kind in kinds:
                peaks = [memory_mib(pid, "VmHWM") for pid in replicas(job, kind)]
                result[f"{kind}_mib"] = {"start": before[kind], "peak": peaks}
            result["stages"] = stages(folder / "ray" / "session_latest" / "logs")
            forwards = sum(status in ("accepted", "rejected") for status in expected)
            cores = len(os.sched_getaffinity(0))
            result |= {"forwards": forwards, "cores": cores}
            result["throughput"] = forwards * result["forward_under_load_cpu_s"] / result["cpu_s"]
            wall = result["seconds"] * cores
            result["throughput_wall"] = forwards * result["forward_under_load_cpu_s"] / wall
            return result
        finally:
            jobs.end()


def send(
    options: argparse.Namespace,
    fixtures: ServiceFixtures,
    url: str,
    token: str,
    claims: Sequence[Any],
    expected: Sequence[str],
    job: Any,
) -> dict[str, Any]:
    """Send all claims over `--clients` connections; with `--kill`, kill a process every few seconds."""
    parts = [list(claims[i : i + options.batch]) for i in range(0, len(claims), options.batch)]
    over, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        while killed < options.kills and not over.wait(options.every):
            for pid in replicas(job, options.kill)[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1

    def verify(part: list[Any]) -> tuple[float, list[dict[str, Any]]]:
        with Client(url, token, timeout_s=3600) as client:
            start = time.perf_counter()
            results = client.verify(part, wait_s=30)
            return time.perf_counter() - start, results

    forwards: list[float] = []
    killer = threading.Thread(target=kill, daemon=True)
    sampler = threading.Thread(target=lambda: forwards.extend(bare_forward(fixtures, 10**6, 1.0, over)))
    sampler.start()
    if options.kill:
        killer.start()
    start, before = time.perf_counter(), cpu_seconds()
    with ThreadPoolExecutor(options.clients) as pool:
        answers = list(pool.map(verify, parts))
    seconds = time.perf_counter() - start
    after = cpu_seconds()
    over.set()
    sampler.join()
    used = {kind: after[kind] - before[kind] for kind in after}
    used["client"] -= sum(forwards)
    statuses = [status_of(result) for _, results in answers for result in results]
    pairs = enumerate(zip(expected, statuses, strict=False))
    wrong = [(i, right, status) for i, (right, status) in pairs if right != status]
    return {
        "claims": len(claims), "answers": len(statuses), "wrong": len(wrong), "first_wrong": wrong[:5],
        "kinds": dict(Counter(statuses)), "killed": killed, "seconds": seconds, "cpu_by": used,
        "cpu_s": sum(used.values()), "claims_per_s": len(claims) / seconds,
        "request_s": quantiles([t for t, _ in answers]),
        "forward_under_load_cpu_s": statistics.median(forwards),
    }  # fmt: skip


def main() -> int:
    """Run and print JSON. The exit code is 1 if an answer is wrong or missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("claims", 1000, "claims"), ("models", 20, "models in S3"), ("keys", 20, "wrong keys"),
        ("width", 16, "width of the ResNet-18"), ("n", 1024, "bits of a key"), ("side", 28, "pixels"),
        ("batch", 50, "claims in a request"), ("clients", 4, "concurrent requests"),
        ("replicas", 1, "verifier replicas"), ("repeats", 9, "pairs for a further claim"),
        ("limit", 64, "MiB of the largest allowed model"), ("steps", 100, "embedding steps"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--kill", choices=["verifier", "ingress"], help="process that is killed under load")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between kills [10]")
    parser.add_argument("--kills", type=int, default=2, help="number of kills [2]")
    parser.add_argument("--only", choices=["further", "load"], help="run one half")
    parser.add_argument("--quick", action="store_true", help="60 claims, 4 models")
    options = parser.parse_args()
    if options.quick:
        options.claims, options.models, options.keys, options.batch, options.repeats = 60, 4, 6, 15, 3
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes, too
    with tempfile.TemporaryDirectory(prefix="mtlsign-", ignore_cleanup_errors=True) as temporary:
        keys = max(options.keys, options.repeats + 2)
        steps = options.steps if options.only != "further" else 0
        fixtures = ServiceFixtures.make(options.width, options.n, options.side, keys, steps)
        result: dict[str, Any] = {"hardware": hardware()}
        if options.only != "load":
            result |= further_claim(fixtures, Path(temporary), options.repeats)
        if options.only != "further":
            result |= measure_under_load(options, fixtures, Path(temporary))
    print(json.dumps(result, indent=1))
    return int(result.get("wrong", 0) > 0 or result.get("answers", 0) != result.get("claims", 0))


if __name__ == "__main__":
    sys.exit(main())
