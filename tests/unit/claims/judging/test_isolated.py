"""Verification in a child process with limits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mtlsign.claims.judging.isolated import IsolatedClaimVerifier
from mtlsign.claims.statements.types import Claim
from mtlsign.storage.safetensors_io import serialize_safetensors
from tests.unit.claims.judging.test_judge import GRAPH, network_tensors, reference  # noqa: F401
from tests.unit.claims.scenario import ALICE, claim_statement, keyed_opening


def sound_claim(data: bytes) -> Claim:
    opening = keyed_opening(ALICE, architecture=GRAPH, reference=hashlib.sha256(data).hexdigest())
    return claim_statement(signer=ALICE.public_key, ledger=bytes(32), time=0, opening=opening)


def test_isolated_judge_over_its_time_gives_a_finding_and_ends_the_child(
    reference: bytes,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One child is started in all, because a start takes seconds."""
    (tmp_path / "mtlsign").mkdir()
    (tmp_path / "mtlsign" / "__init__.py").write_text(
        "raise SystemExit('a package of the working directory')"
    )
    monkeypatch.chdir(tmp_path)
    claim, model = sound_claim(reference), serialize_safetensors(network_tensors())
    verifier = IsolatedClaimVerifier()
    try:
        assert verifier.judge(claim, reference, None, model, 120).status == "unrelated"
        assert verifier.verdicts[hashlib.sha256(model).hexdigest()]["n"] == 128
        process = verifier._process
        assert verifier.judge(claim, b"damaged", None, model, 120).status == "inadmissible"
        assert verifier._process is process  # a refused claim does not end the child
        verifier._seconds = 0.001
        late = verifier.judge(claim, reference, None, model, 120)
        assert late.status in ("inadmissible", "not_verifiable") and "took over 0.001 s" in late.reason
        assert verifier._process is None and process is not None and process.returncode is not None
    finally:
        verifier.close()


@pytest.mark.parametrize(
    ("limit", "load", "sign"),
    [
        ("_limit_memory(2**26)", "bytes(2**28)", "MemoryError"),
        ("_limit_cpu(0)", "all(iter(int, 1)) or all(iter(lambda: 1, 0))", ""),
    ],
)
def test_worker_limits_end_a_process_that_exceeds_them(limit: str, load: str, sign: str) -> None:
    script = f"from mtlsign.claims.judging import worker\nworker.{limit}\n{load}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and sign in ended.stderr
