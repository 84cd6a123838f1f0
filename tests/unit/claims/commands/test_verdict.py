"""Check of a verdict that a verification service signed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mtlsign.claims.commands.verdict import check_verdict
from mtlsign.claims.statements.envelope import sign
from mtlsign.commands.verify import verify
from mtlsign.config.verify import VerdictSettings
from mtlsign.errors import ClaimError
from mtlsign.service.auth.signing import ServiceKeys
from tests.unit.claims.scenario import ALICE, BOB

MODEL = b"a model"
VERDICT: dict[str, Any] = {
    "status": "accepted", "matches": 128, "n": 128, "near_zero": 0, "evidence_bits": 128.0,
    "bits_required": 120.0, "statistic": "count", "reason": None,
    "model_digest": hashlib.sha256(MODEL).hexdigest(),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Verdict signed by the service of ALICE."""
    path = tmp_path / "verdict.dsse.json"
    outcome = {"verdict": VERDICT, "key": "ab" * 32}
    path.write_bytes(ServiceKeys(ALICE).sign(outcome, "an id", 1_790_000_000))
    return path


def check(file: Path, **settings: Any) -> dict[str, Any]:
    return check_verdict(VerdictSettings.of({"verdict": file, **settings}))


def test_check_verdict_with_trusted_key_and_model_returns_its_fields(file: Path) -> None:
    model = file.with_name("model.safetensors")
    model.write_bytes(MODEL)
    result = check(file, key=(ALICE.public_key.hex(),), model=str(model))
    assert result["trusted"] and result["status"] == "accepted" and result["evidence_bits"] == 128
    assert result["signed"] == "2026-09-21T14:13:20Z" and result["signer"] == ALICE.public_key.hex()
    model.write_bytes(b"another model")
    with pytest.raises(ClaimError, match="The verdict is about the model"):
        check(file, model=str(model))


def test_check_verdict_without_key_remarks_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(["--verdict", str(file)])
    output = capsys.readouterr().out
    assert "No key was given" in output and ALICE.public_key.hex() in output and "2026-09-21T" in output


def test_check_verdict_of_other_signer_or_altered_file_is_refused(file: Path) -> None:
    with pytest.raises(ClaimError, match="not one of the given keys"):
        check(file, key=(BOB.public_key.hex(),))
    with pytest.raises(ClaimError, match="64 hexadecimal digits"):
        check(file, key=("xyz",))
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ClaimError):
            check(file)


@pytest.mark.parametrize(
    "change", [{"signer": BOB.public_key.hex()}, {"matches": "1"}, {"more": 1}, {"key": "x"}]
)
def test_check_verdict_with_malformed_fields_is_refused(file: Path, change: dict[str, Any]) -> None:
    from mtlsign.claims.statements.envelope import open_envelope

    statement = json.loads(open_envelope(file.read_bytes()).payload)
    statement["predicate"] |= change
    file.write_bytes(sign(json.dumps(statement, separators=(",", ":")).encode(), ALICE))
    with pytest.raises(ClaimError):
        check(file)
