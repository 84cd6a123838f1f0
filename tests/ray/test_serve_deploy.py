"""The cluster commands of jobs/README.md on a head node of this machine.

They are `serve deploy`, `serve status`, the token command, and batch work through `ray job submit`. `ray up`,
`ray rsync-up` and `ray exec` need rented machines; the commands that they transport run here.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mtlsign.service.client import Client, make_claim
from mtlsign.storage.model_folder import model_bytes
from tests.helpers.job_harness import ROOT, JobLauncher, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_serve_deploy_and_submitted_batch_job_return_right_results(
    jobs: JobLauncher, marked_model: Any, tmp_path: Path
) -> None:
    from mtlsign.distributed.serve import PROXY_SETTING, PROXY_VALUE

    _, result = marked_model
    model = tmp_path / "models" / "marked.safetensors"
    model.parent.mkdir()
    model.write_bytes(model_bytes(result.tensors))
    claim = make_claim(f"file://{model}", result.kit.opening, result.kit.reference)
    state = tmp_path / "state"
    env = {
        PROXY_SETTING: PROXY_VALUE,
        "MTLSIGN_STATE_DIR": str(state),
        "MTLSIGN_ALLOWED_LOCATIONS": f"file://{model.parent}",
        "PYTHONPATH": str(ROOT),
    }
    node, address, dashboard = jobs.head(**env)
    try:
        port = free_port() + 2
        deployed = tmp_path / "serve.yaml"
        deployed.write_text(
            re.sub(r"port: 8000", f"port: {port}", (ROOT / "jobs" / "serve.yaml").read_text())
        )
        serve = ("-m", "ray.serve.scripts")
        jobs.python(*serve, "deploy", str(deployed), "--address", dashboard, **env).wait()

        def status() -> str:
            return jobs.python(*serve, "status", "--address", dashboard, **env).wait()

        end = time.monotonic() + 600
        while "RUNNING" not in (output := status()) and time.monotonic() < end:
            assert "DEPLOY_FAILED" not in output, output
            time.sleep(2)
        url = f"http://127.0.0.1:{port}"
        assert urllib.request.urlopen(url + "/readyz").status == 200
        token = jobs.python("-m", "mtlsign.service", "token", "alice", **env).wait().split()[-1]
        with Client(url, token, timeout_s=300) as client:
            (answer,) = client.verify([claim])
        assert answer["verdict"]["status"] == "accepted"
        jobs.python(*serve, "shutdown", "--yes", "--address", dashboard, **env).wait()

        lines, out = tmp_path / "claims.jsonl", tmp_path / "results.jsonl"
        claims = [claim, {**claim, "model": "file:///etc/passwd"}]
        lines.write_text("".join(json.dumps(item) + "\n" for item in claims))
        jobs.cli(
            "job", "submit", "--address", dashboard, "--working-dir", ".", "--runtime-env",
            "jobs/runtime_env.yaml", "--", sys.executable, "jobs/verify_batch.py", "--claims", str(lines),
            "--output", str(out), "--state-dir", str(tmp_path / "batch"),
            "--allowed-locations", f"file://{model.parent}",
            RAY_ADDRESS=address,
        ).wait()  # fmt: skip
        first, second = [json.loads(line) for line in out.read_text().splitlines()]
        assert first["verdict"]["status"] == "accepted"
        assert second["problem"]["type"].endswith("pointer-refused")
    finally:
        node.end()
