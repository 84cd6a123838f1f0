"""The service on real Ray Serve: right answers, killed replicas under load, a killed ingress, bulk work."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3
from safetensors.torch import save

from mtlsign.config.service import ServiceSettings
from mtlsign.distributed import serve
from mtlsign.service.auth import tokens
from mtlsign.service.auth.signing import read_verdict
from mtlsign.service.client import Client, make_claim
from mtlsign.service.database import Database
from mtlsign.storage.model_folder import model_bytes
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import sign_spec
from mtlsign.watermark.keys.spec import make_spec
from tests.helpers.job_harness import Job, Jobs
from tests.helpers.tls_fixtures import certificate

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Running:
    """jobs/serve.py with claims that one knows the answers of."""

    def __init__(
        self, jobs: Jobs, marked: Any, owner: Identity, folder: Path, verifiers: int = 2, *more: str
    ) -> None:
        self.goods, self.state, self.ray = folder / "goods", folder / "state", jobs.ray
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
        self.flags = ["--state", str(self.state), "--allow", f"file://{self.goods}", *more]
        port = self.url.rpartition(":")[2]
        self.job: Job = jobs.python(
            "jobs/serve.py", "--port", port, "--verifiers", str(verifiers), *self.flags,
            "--max-body-mb", "4", "--controls", "4", PYTHONUNBUFFERED="1",
        )  # fmt: skip
        self.job.until(lambda: "answers" in self.job.out, 600)
        store = Database(self.state / "service.sqlite")
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
            claim = make_claim(pointers[i % 5], self.right if right else self.other, self.reference)
            answer = "accepted" if right and i % 5 == 0 else "rejected"
            if i % 10 == 7:
                claim["bundle"]["reference"] = base64.b64encode(b"%d" % i).decode()
                answer = "bad-bundle"
            found.append(claim)
            wanted.append(answer)
        return found, wanted

    def replicas(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        return [
            pid for pid, command in self.job.family().items() if f"ServeReplica:mtlsign:{name}" in command
        ]

    def figure(self, name: str) -> float:
        """A sum over all labels and nodes of what Ray exports for Prometheus."""
        found = self.ray / "ray" / "prom_metrics_service_discovery.json"
        total, end = 0.0, time.monotonic() + 60
        while not total and time.monotonic() < end:
            for target in json.loads(found.read_text())[0]["targets"]:
                text = urllib.request.urlopen(f"http://{target}/metrics").read().decode()
                for line in text.splitlines():
                    if re.match(rf"(ray_)?{name}(_total)?[{{ ]", line):
                        total += float(line.rpartition(" ")[2])
            time.sleep(1.0)
        return total


def said(results: list[dict[str, Any]]) -> list[str]:
    return [
        r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2] for r in results
    ]


@pytest.fixture(scope="module")
def running(jobs: Jobs, marked: Any, owner: Identity, tmp_path_factory: pytest.TempPathFactory) -> Running:
    return Running(jobs, marked, owner, tmp_path_factory.mktemp("serve"))


def test_the_service_starts_and_answers_over_tls(
    jobs: Jobs, marked: Any, owner: Identity, tmp_path: Path
) -> None:
    """The smallest thing that is the whole: jobs/serve.py, a right key, a wrong key, a pointer out."""
    cert, key = certificate(tmp_path)
    service = Running(jobs, marked, owner, tmp_path, 1, "--tls-cert", str(cert), "--tls-key", str(key))
    model = f"file://{service.goods}/marked.safetensors"
    claims = [
        make_claim(model, service.right, service.reference), make_claim(model, service.other, service.reference),
        make_claim("file:///etc/passwd", service.right, service.reference),
    ]  # fmt: skip
    url = service.url.replace("http://127.0.0.1", "https://localhost")
    with Client(url, service.token, patience_s=120, ca=cert) as client:
        results = client.verify(claims)
        assert said(results) == ["accepted", "rejected", "pointer-refused"]
        verdict = read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())
    assert verdict["suspect"] == service.digest
    context = ssl.create_default_context(cafile=cert)
    assert urllib.request.urlopen(url + "/readyz", context=context).status == 200
    proxy = ServiceSettings.of({"port": int(url.rpartition(":")[2]), "tls_cert": cert, "tls_key": key})
    assert serve.bounds_bodies(proxy)
    service.job.end()


@pytest.mark.slow
def test_right_answers_signed_and_measured(running: Running) -> None:
    claims, wanted = running.claims(30)
    with Client(running.url, running.token, patience_s=120) as client:
        results = client.verify(claims, wait_s=1)
        assert said(results) == wanted
        assert results[0]["verdict"]["model_digest"] == running.digest
        assert read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())["status"] == "accepted"
    for path in ("/healthz", "/readyz", "/docs", "/"):
        assert urllib.request.urlopen(running.url + path).status == 200


@pytest.mark.slow
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


@pytest.mark.slow
def test_killed_verifiers_lose_nothing(running: Running) -> None:
    """Both replicas have work all the time, so whichever dies has some in hand; up to three do."""
    claims, wanted = running.claims(320)
    killed: list[int] = []
    with Client(running.url, running.token, patience_s=900) as client:
        documents = [client.submit(claims[at : at + 40], wait_s=0) for at in range(0, 320, 40)]
        path = f"/v1/verifications/{documents[-1]['id']}"
        while json.loads(client._send("GET", path, {}).data)["state"] == "running" and len(killed) < 3:
            pid = running.replicas("verify")[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            end = time.monotonic() + 300
            while len(set(running.replicas("verify")) - set(killed)) < 2 and time.monotonic() < end:
                time.sleep(0.2)
        results = [result for document in documents for result in client.wait(document)]
        assert said(results) == wanted
        assert said(client.verify(claims[:40])) == wanted[:40]  # whoever came after the dead answers too
    assert killed and running.figure("mtlsign_retries") > 0


@pytest.mark.slow
def test_a_killed_ingress_loses_nothing(running: Running) -> None:
    """Requests that are waited for die with the ingress; the client sends them again under the same key."""
    claims, wanted = running.claims(100)
    (gate,) = running.replicas("gate")

    def one(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with Client(running.url, running.token, patience_s=900) as client:
            return client.verify(part, wait_s=30)

    def kept() -> tuple[int, int, int]:
        store = Database(running.state / "service.sqlite")
        query = "SELECT count(*), count(DISTINCT idem), sum(finished IS NULL) FROM jobs WHERE count=25"
        (found,) = store.rows(query)
        store.close()
        return found

    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(one, claims[at : at + 25]) for at in range(0, 100, 25)]
        while kept()[0] < 4:
            time.sleep(0.05)
        assert kept()[2] > 0  # unanswered, and waited for
        os.kill(gate, signal.SIGKILL)
        assert said([result for part in parts for result in part.result(900)]) == wanted
    assert gate not in running.replicas("gate")
    assert kept() == (4, 4, 0)  # each was kept once, however often it was sent


@pytest.mark.slow
def test_figures_and_log_say_what_happened_and_no_secret(running: Running) -> None:
    with Client(running.url, running.token, patience_s=120) as client:
        client.verify([make_claim(running.model("logged", 77), running.right, running.reference)])
    for name in ("mtlsign_claims", "mtlsign_answers", "mtlsign_stage_seconds_count", "mtlsign_cache"):
        assert running.figure(name) > 0, name
    logs = list((running.ray / "ray" / "session_latest" / "logs").rglob("*"))
    whole = b"".join(path.read_bytes() for path in logs if path.is_file())
    events = [
        json.loads(line) for line in whole.decode(errors="replace").splitlines() if line.startswith('{"')
        and '"event"' in line
    ]  # fmt: skip
    assert {"accepted", "asked", "answered", "request"} <= {event["event"] for event in events}
    token = running.token.split("_")[1]
    assert any(event.get("token") == token for event in events)
    opening = json.loads(running.right.to_json())
    for secret in (
        running.token,
        running.token.split("_")[2],
        opening["signature"],
        opening["spec"],
        "logged.safe",
    ):
        assert secret.encode() not in whole


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
