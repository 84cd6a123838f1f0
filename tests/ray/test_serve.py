"""The service on real Ray Serve: right answers, killed replicas under load, a killed ingress, bulk work."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import urllib3
from job_process import Job, Jobs
from safetensors.torch import save

from mtlsign.artifact import model_bytes
from mtlsign.client import Client, claim_of
from mtlsign.key import Identity, make_spec, sign_spec
from mtlsign.service import tokens
from mtlsign.service.signing import read_verdict
from mtlsign.service.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running:
    """jobs/serve.py with claims that one knows the answers of."""

    def __init__(self, jobs: Jobs, marked: Any, owner: Identity, folder: Path) -> None:
        self.goods, self.state = folder / "goods", folder / "state"
        self.goods.mkdir()
        _, done = marked
        self.tensors, kit = done.tensors, done.kit
        data = model_bytes(done.tensors)
        self.digest = hashlib.sha256(data).hexdigest()
        (self.goods / "marked.safetensors").write_bytes(data)
        fields = json.loads(kit.opening.spec) | {"nonce": "11" * 32}
        self.right, self.other = kit.opening, sign_spec(owner, make_spec(**fields))
        self.reference = kit.reference
        self.url = f"http://127.0.0.1:{free_port()}"
        self.flags = ["--state", str(self.state), "--allow", f"file://{self.goods}"]
        port = self.url.rpartition(":")[2]
        self.job: Job = jobs.python(
            "jobs/serve.py", "--port", port, "--verifiers", "2", *self.flags,
            "--max-body-mb", "4", PYTHONUNBUFFERED="1",
        )  # fmt: skip
        self.job.until(lambda: "answers" in self.job.out, 600)
        store = Store(self.state / "service.sqlite")
        self.token = tokens.issue(store, "test", ["verify", "ledger"], 1)
        store.close()

    def model(self, name: str, seed: int) -> str:
        """A further model without the mark; its pointer."""
        import torch

        gen = torch.Generator().manual_seed(seed)
        made = {n: torch.randn(t.shape, generator=gen).to(t.dtype) for n, t in self.tensors.items()}
        (self.goods / f"{name}.safetensors").write_bytes(save(made))
        return f"file://{self.goods}/{name}.safetensors"

    def claims(self, count: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Mixed claims over five models, one in ten broken, and the right answers."""
        pointers = [f"file://{self.goods}/marked.safetensors"] + [self.model(f"m{i}", i) for i in range(4)]
        found, wanted = [], []
        for i in range(count):
            right = i % 3 == 0
            claim = claim_of(pointers[i % 5], self.right if right else self.other, self.reference)
            answer = "accepted" if right and i % 5 == 0 else "rejected"
            if i % 10 == 7:
                claim["bundle"]["reference"] = base64.b64encode(b"%d" % i).decode()
                answer = "bad-bundle"
            found.append(claim)
            wanted.append(answer)
        return found, wanted

    def pids(self, name: str) -> list[int]:
        return [
            pid for pid, command in self.job.family().items() if f"ServeReplica:mtlsign:{name}" in command
        ]


def said(results: list[dict[str, Any]]) -> list[str]:
    return [
        r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2] for r in results
    ]


@pytest.fixture(scope="module")
def running(jobs: Jobs, marked: Any, owner: Identity, tmp_path_factory: pytest.TempPathFactory) -> Running:
    return Running(jobs, marked, owner, tmp_path_factory.mktemp("serve"))


def test_right_answers_signed_and_measured(running: Running) -> None:
    claims, wanted = running.claims(30)
    with Client(running.url, running.token, patience_s=120) as client:
        results = client.verify(claims, wait_s=1)
        assert said(results) == wanted
        assert results[0]["verdict"]["model_digest"] == running.digest
        assert read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())["status"] == "accepted"
    for path in ("/healthz", "/readyz", "/docs", "/"):
        assert urllib.request.urlopen(running.url + path).status == 200


def test_the_proxy_bounds_bodies_before_it_holds_them(running: Running) -> None:
    pool = urllib3.PoolManager(retries=False)
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
    proxies = [pid for pid, command in running.job.family().items() if "ProxyActor" in command]
    assert proxies

    def resident() -> int:
        fields = Path(f"/proc/{proxies[0]}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    before, sent = resident(), 0

    def gigabyte() -> Any:
        nonlocal sent
        for _ in range(1024):
            sent += 2**20
            yield b"x" * 2**20

    try:
        answer = pool.request("POST", running.url + "/v1/verifications", headers=headers, body=gigabyte())
        assert answer.status == 413 and answer.json()["type"].endswith("too-large")
    except urllib3.exceptions.ProtocolError:
        pass  # it closed while we were still sending
    assert sent < 200 * 2**20 and resident() - before < 200 * 2**20


def test_killed_verifiers_lose_nothing(running: Running) -> None:
    claims, wanted = running.claims(120)
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(3):
            for pid in running.pids("verify")[:1]:
                os.kill(pid, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    with Client(running.url, running.token, patience_s=300) as client:
        results = [r for at in range(0, 120, 40) for r in client.verify(claims[at : at + 40], wait_s=0)]
    stop.set()
    killer.join()
    assert said(results) == wanted


def test_a_killed_ingress_loses_nothing(running: Running) -> None:
    claims, wanted = running.claims(60)
    (gate,) = running.pids("gate")
    with Client(running.url, running.token, patience_s=300) as client:
        document = client.submit(claims, wait_s=0, key="the-same")
        os.kill(gate, signal.SIGKILL)
        again = client.submit(claims, wait_s=0, key="the-same")
        assert again["id"] == document["id"]
        assert said(client.wait(again)) == wanted
    end = time.monotonic() + 60
    while not running.pids("gate") or gate in running.pids("gate"):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_bulk_work(running: Running, jobs: Jobs, tmp_path: Path) -> None:
    claims, wanted = running.claims(40)
    lines = tmp_path / "claims.jsonl"
    lines.write_text("".join(json.dumps(claim) + "\n" for claim in claims) + "{broken\n")
    running.job.end()
    job = jobs.python(
        "jobs/verify_batch.py", "--claims", str(lines), "--out", str(tmp_path / "out.jsonl"), "--state",
        str(tmp_path / "state"), "--allow", f"file://{running.goods}", "--json",
    )  # fmt: skip
    job.wait()
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert said(results) == [*wanted, "bad-claim"]
    assert read_verdict(results[0]["envelope"].encode())["suspect"] == running.digest
