"""jobs/README.md's lines for a cluster, on a head node of this machine: `serve deploy`, `serve status`, a
token, bulk work through `ray job submit`.

`ray up`, `ray rsync-up` and `ray exec` want machines to rent: what they carry is what runs here.
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
from tests.helpers.job_harness import ROOT, Jobs, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_serve_deploy_and_bulk_work_through_submit(jobs: Jobs, marked: Any, tmp_path: Path) -> None:
    from mtlsign.distributed.serve import PROXY_SETTING, PROXY_VALUE

    _, done = marked
    model = tmp_path / "goods" / "marked.safetensors"
    model.parent.mkdir()
    model.write_bytes(model_bytes(done.tensors))
    claim = make_claim(f"file://{model}", done.kit.opening, done.kit.reference)
    state = tmp_path / "state"
    env = {
        PROXY_SETTING: PROXY_VALUE, "MTLSIGN_STATE": str(state), "MTLSIGN_ALLOW": f"file://{model.parent}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
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
        while "RUNNING" not in (said := status()) and time.monotonic() < end:
            assert "DEPLOY_FAILED" not in said, said
            time.sleep(2)
        url = f"http://127.0.0.1:{port}"
        assert urllib.request.urlopen(url + "/readyz").status == 200
        token = jobs.python("-m", "mtlsign.service", "token", "alice", **env).wait().split()[-1]
        with Client(url, token, patience_s=300) as client:
            (result,) = client.verify([claim])
        assert result["verdict"]["status"] == "accepted"
        jobs.python(*serve, "shutdown", "--yes", "--address", dashboard, **env).wait()

        lines, out = tmp_path / "claims.jsonl", tmp_path / "results.jsonl"
        claims = [claim, {**claim, "model": "file:///etc/passwd"}]
        lines.write_text("".join(json.dumps(one) + "\n" for one in claims))
        jobs.cli(
            "job", "submit", "--address", dashboard, "--working-dir", ".", "--runtime-env",
            "jobs/runtime_env.yaml", "--", sys.executable, "jobs/verify_batch.py", "--claims", str(lines),
            "--out", str(out), "--state", str(tmp_path / "batch"), "--allow", f"file://{model.parent}",
            RAY_ADDRESS=address,
        ).wait()  # fmt: skip
        first, second = [json.loads(line) for line in out.read_text().splitlines()]
        assert first["verdict"]["status"] == "accepted"
        assert second["problem"]["type"].endswith("pointer-refused")
    finally:
        node.end()
