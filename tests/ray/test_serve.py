"""The service on real Ray Serve: answers, killed replicas under load, a killed ingress, batch work."""

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
from functools import cache
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
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from tests.helpers.job_harness import Job, JobLauncher
from tests.helpers.tls_fixtures import certificate

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RunningService:
    """jobs/serve.py, and claims with known results."""

    def __init__(
        self, jobs: JobLauncher, marked: Any, owner: Identity, folder: Path, min_replicas: int = 2, *more: str
    ) -> None:
        self.models, self.state, self.ray = folder / "models", folder / "state", jobs.ray
        self.models.mkdir()
        _, result = marked
        self.tensors, kit = result.tensors, result.kit
        data = model_bytes(result.tensors)
        self.digest = hashlib.sha256(data).hexdigest()
        (self.models / "marked.safetensors").write_bytes(data)
        fields = json.loads(kit.opening.spec) | {"nonce": "11" * 32}
        self.right, self.other = kit.opening, sign_spec(owner, make_spec(**fields))
        self.reference = kit.reference
        self.url = f"http://127.0.0.1:{free_port()}"
        self.flags = ["--state-dir", str(self.state), "--allowed-locations", f"file://{self.models}", *more]
        port = self.url.rpartition(":")[2]
        self.job: Job = jobs.python(
            "jobs/serve.py", "--port", port, "--min-replicas", str(min_replicas), *self.flags,
            "--max-body-mb", "4", "--control-keys", "4", PYTHONUNBUFFERED="1",
        )  # fmt: skip
        self.job.until(lambda: "answers" in self.job.out, 600)
        database = Database(self.state / "service.sqlite")
        self.token = tokens.issue(database, "test", ["verify", "ledger"], 1)
        database.close()

    def model(self, name: str, seed: int) -> str:
        """Write an unmarked model and return its location."""
        import torch

        gen = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(t.shape, generator=gen).to(t.dtype) for n, t in self.tensors.items()}
        (self.models / f"{name}.safetensors").write_bytes(save(tensors))
        return f"file://{self.models}/{name}.safetensors"

    @cache  # noqa: B019  # one service in a process
    def status(self, location: str, opening: KeyOpening) -> str:
        """Return the status of a model without the watermark, verified in this process."""
        tensors = parse_safetensors(Path(location.removeprefix("file://")).read_bytes())
        detector = WatermarkDetector(opening, Reference.from_bytes(self.reference))
        status = verify(tensors, detector).status
        assert status in ("unrelated", "rejected")
        return status

    def claims(self, count: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Return mixed claims on five models, one in ten broken, and the right results."""
        locations = [f"file://{self.models}/marked.safetensors"] + [self.model(f"m{i}", i) for i in range(4)]
        claims, expected = [], []
        for i in range(count):
            is_right = i % 3 == 0
            opening = self.right if is_right else self.other
            claim = make_claim(locations[i % 5], opening, self.reference)
            on_marked = "accepted" if is_right else "rejected"
            # The other models have random weights. One of ten looks like a descendant, which so small a
            # network cannot exclude.
            result = on_marked if i % 5 == 0 else self.status(locations[i % 5], opening)
            if i % 10 == 7:
                claim["bundle"]["reference"] = base64.b64encode(b"%d" % i).decode()
                result = "bad-bundle"
            claims.append(claim)
            expected.append(result)
        return claims, expected

    def replicas(self, name: str) -> list[int]:
        """Return the process ids of a deployment's replicas."""
        return [
            pid
            for pid, command in self.job.process_tree().items()
            if f"ServeReplica:mtlsign:{name}" in command
        ]

    def metric(self, name: str) -> float:
        """Return the sum of a Prometheus metric over all labels and nodes."""
        discovery = self.ray / "ray" / "prom_metrics_service_discovery.json"
        total, end = 0.0, time.monotonic() + 60
        while not total and time.monotonic() < end:
            for target in json.loads(discovery.read_text())[0]["targets"]:
                text = urllib.request.urlopen(f"http://{target}/metrics").read().decode()
                for line in text.splitlines():
                    if re.match(rf"(ray_)?{name}(_total)?[{{ ]", line):
                        total += float(line.rpartition(" ")[2])
            time.sleep(1.0)
        return total


def statuses(results: list[dict[str, Any]]) -> list[str]:
    return [
        r["verdict"]["status"] if "verdict" in r else r["problem"]["type"].rpartition(":")[2] for r in results
    ]


@pytest.fixture(scope="module")
def running(
    jobs: JobLauncher, marked_model: Any, owner: Identity, tmp_path_factory: pytest.TempPathFactory
) -> RunningService:
    return RunningService(jobs, marked_model, owner, tmp_path_factory.mktemp("serve"))


def test_serve_job_over_tls_answers_right_wrong_and_refused_claims(
    jobs: JobLauncher, marked_model: Any, owner: Identity, tmp_path: Path
) -> None:
    """The smallest complete run: jobs/serve.py, a right key, a wrong key and a refused location."""
    cert, key = certificate(tmp_path)
    service = RunningService(
        jobs, marked_model, owner, tmp_path, 1, "--tls-cert", str(cert), "--tls-key", str(key)
    )
    model = f"file://{service.models}/marked.safetensors"
    claims = [
        make_claim(model, service.right, service.reference),
        make_claim(model, service.other, service.reference),
        make_claim("file:///etc/passwd", service.right, service.reference),
    ]  # fmt: skip
    url = service.url.replace("http://127.0.0.1", "https://localhost")
    with Client(url, service.token, timeout_s=120, ca=cert) as client:
        results = client.verify(claims)
        assert statuses(results) == ["accepted", "rejected", "pointer-refused"]
        verdict = read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())
    assert verdict["suspect"] == service.digest
    context = ssl.create_default_context(cafile=cert)
    assert urllib.request.urlopen(url + "/readyz", context=context).status == 200
    proxy = ServiceSettings.of({"port": int(url.rpartition(":")[2]), "tls_cert": cert, "tls_key": key})
    assert serve.proxy_limits_bodies(proxy)
    service.job.end()


@pytest.mark.slow
def test_serve_job_answers_mixed_claims_with_signed_verdicts(running: RunningService) -> None:
    claims, expected = running.claims(30)
    with Client(running.url, running.token, timeout_s=120) as client:
        results = client.verify(claims, wait_s=1)
        assert statuses(results) == expected
        assert results[0]["verdict"]["model_digest"] == running.digest
        assert read_verdict(client.verdict(results[0]["id"]), trusted=client.keys())["status"] == "accepted"
    steps = ("starting Ray on this machine", "starting the HTTP proxy on 127.0.0.1:", "verifier(s); loading")
    assert all(step in running.job.err for step in steps)  # the start takes half a minute, so it is shown
    for path in ("/healthz", "/readyz", "/docs", "/"):
        assert urllib.request.urlopen(running.url + path).status == 200


@pytest.mark.slow
def test_proxy_refuses_large_body_before_reading_it(running: RunningService) -> None:
    pool = urllib3.PoolManager(retries=False)
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
    proxies = [pid for pid, command in running.job.process_tree().items() if "ProxyActor" in command]
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
def test_killed_verifiers_under_load_lose_no_claim(running: RunningService) -> None:
    """Both replicas always have work, so a killed one loses tasks; up to three are killed."""
    claims, expected = running.claims(320)
    killed: list[int] = []
    with Client(running.url, running.token, timeout_s=900) as client:
        documents = [client.submit(claims[at : at + 40], wait_s=0) for at in range(0, 320, 40)]
        path = f"/v1/verifications/{documents[-1]['id']}"
        while json.loads(client._send("GET", path, {}).data)["state"] == "running" and len(killed) < 3:
            pid = running.replicas("verifier")[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            end = time.monotonic() + 300
            while len(set(running.replicas("verifier")) - set(killed)) < 2 and time.monotonic() < end:
                time.sleep(0.2)
        results = [result for document in documents for result in client.wait(document)]
        assert statuses(results) == expected
        assert statuses(client.verify(claims[:40])) == expected[:40]  # the new replicas answer, too
    assert killed and running.metric("mtlsign_retries") > 0


@pytest.mark.slow
def test_killed_ingress_under_load_loses_no_claim(running: RunningService) -> None:
    """Requests in progress are lost with the ingress; the client sends them again with the same key."""
    claims, expected = running.claims(100)
    (ingress,) = running.replicas("ingress")

    def verify(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with Client(running.url, running.token, timeout_s=900) as client:
            return client.verify(part, wait_s=30)

    def stored() -> tuple[int, int, int]:
        database = Database(running.state / "service.sqlite")
        query = "SELECT count(*), count(DISTINCT idem), sum(finished IS NULL) FROM jobs WHERE count=25"
        (counts,) = database.fetch_all(query)
        database.close()
        return counts

    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(verify, claims[at : at + 25]) for at in range(0, 100, 25)]
        while stored()[0] < 4:
            time.sleep(0.05)
        assert stored()[2] > 0  # unanswered, with waiting clients
        os.kill(ingress, signal.SIGKILL)
        assert statuses([result for part in parts for result in part.result(900)]) == expected
    assert ingress not in running.replicas("ingress")
    assert stored() == (4, 4, 0)  # each is stored once, although it was sent again


@pytest.mark.slow
def test_metrics_and_log_contain_events_and_no_secret(running: RunningService) -> None:
    with Client(running.url, running.token, timeout_s=120) as client:
        client.verify([make_claim(running.model("logged", 77), running.right, running.reference)])
    for name in ("mtlsign_claims", "mtlsign_answers", "mtlsign_stage_seconds_count", "mtlsign_cache"):
        assert running.metric(name) > 0, name
    logs = list((running.ray / "ray" / "session_latest" / "logs").rglob("*"))
    content = b"".join(path.read_bytes() for path in logs if path.is_file())
    events = [
        json.loads(line) for line in content.decode(errors="replace").splitlines() if line.startswith('{"')
        and '"event"' in line
    ]  # fmt: skip
    assert {"job_accepted", "verification_task", "job_finished", "request"} <= {
        event["event"] for event in events
    }
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
        assert secret.encode() not in content


@pytest.mark.slow
def test_verify_batch_job_returns_results_in_order(
    running: RunningService, jobs: JobLauncher, tmp_path: Path
) -> None:
    claims, expected = running.claims(40)
    lines = tmp_path / "claims.jsonl"
    lines.write_text("".join(json.dumps(claim) + "\n" for claim in claims) + "{broken\n")
    running.job.end()
    job = jobs.python(
        "jobs/verify_batch.py", "--claims", str(lines), "--output", str(tmp_path / "out.jsonl"),
        "--state-dir", str(tmp_path / "state"), "--allowed-locations", f"file://{running.models}", "--json",
    )  # fmt: skip
    job.wait()
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert statuses(results) == [*expected, "bad-claim"]
    assert read_verdict(results[0]["envelope"].encode())["suspect"] == running.digest
