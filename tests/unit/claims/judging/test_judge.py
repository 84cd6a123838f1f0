"""Findings on claims with defects: the claim is at fault before the accused model is opened."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlsign.claims.judging.judge import DetectorClaimVerifier, Finding
from mtlsign.models import architectures
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.verification.reference import make_reference
from tests.unit.claims.scenario import ALICE, claim_statement, keyed_opening

GRAPH: dict[str, Any] = architectures.architecture_for(
    "resnet18", channels=1, classes=4, width=8, stem="stock"
)
HOSTILE_NAME = "layer1.0.conv1.weight <!-- mtlsign claim: end -->"


def network_tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(architectures.build(GRAPH).state_dict())


@pytest.fixture(scope="module")
def reference() -> bytes:
    torch.manual_seed(1)
    return make_reference(architectures.build(GRAPH), ["layer1"], torch.zeros(1, 1, 24, 24)).raw_bytes


def judge_claim(reference: bytes, model: bytes | None = None, **spec: Any) -> Finding:
    """Return the finding of a claim with changed fields on an unrelated model."""
    fields = {"architecture": GRAPH, "reference": hashlib.sha256(reference).hexdigest()} | spec
    claim = claim_statement(
        signer=ALICE.public_key, ledger=bytes(32), time=0, opening=keyed_opening(ALICE, **fields)
    )
    model = serialize_safetensors(network_tensors()) if model is None else model
    return DetectorClaimVerifier().judge(claim, reference, None, model, 120)


def changed(reference: bytes, name: str, value: float) -> bytes:
    """Return the reference with one value in every tensor of a kind."""
    tensors = parse_safetensors(reference)
    return serialize_safetensors(
        {key: torch.full_like(t, value) if key.endswith(name) else t for key, t in tensors.items()}
    )


def test_judge_of_sound_claim_on_independent_model_finds_it_unrelated(reference: bytes) -> None:
    assert judge_claim(reference).status == "unrelated"


@pytest.mark.parametrize(
    "spec",
    [
        {"architecture": GRAPH | {"arch": "resnet19"}},
        {"architecture": GRAPH | {"arch": "custom/package.module:function"}},
        {"taps": ["layer9"]},
        {"carrier": qr.make_carrier(128, 3, 24, 24)},
    ],
)
def test_judge_of_claim_without_valid_network_is_inadmissible(reference: bytes, spec: dict[str, Any]) -> None:
    finding = judge_claim(reference, **spec)
    assert finding.status == "inadmissible" and finding.reason


@pytest.mark.parametrize(("name", "value"), [("/eps", -1.0), ("/gamma", 3e38), ("/columns", 3e38)])
def test_judge_of_claim_with_defective_reference_is_inadmissible(
    reference: bytes, name: str, value: float
) -> None:
    assert judge_claim(changed(reference, name, value)).status == "inadmissible"


def test_judge_of_heavy_claim_is_inadmissible_before_anything_is_built(
    reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mtlsign.watermark.verification.detector.WatermarkDetector.__init__",
        lambda *_, **__: pytest.fail("built"),
    )
    architecture = GRAPH | {"arch": "resnet50", "width": 128}
    finding = judge_claim(
        reference,
        architecture=architecture,
        taps=["layer4"],
        n=4096,
        carrier=qr.make_carrier(4096, 1, 84, 84),
    )
    assert finding.status == "inadmissible" and "docs/claims.md" in finding.reason


@pytest.mark.parametrize("case", ["bytes", "missing", "not finite", "hostile name"])
def test_judge_of_unreadable_model_is_not_verifiable_and_quotes_no_name(reference: bytes, case: str) -> None:
    tensors = network_tensors()
    if case == "missing":
        del tensors["layer1.0.conv1.weight"]
    elif case == "not finite":
        tensors["layer1.0.conv1.weight"][:] = float("nan")
    elif case == "hostile name":
        tensors[HOSTILE_NAME] = tensors.pop("layer1.0.conv1.weight")
    model = b"no safetensors file" if case == "bytes" else serialize_safetensors(tensors)
    finding = judge_claim(reference, model)
    assert finding.status == "not_verifiable" and finding.reason and "<!--" not in finding.reason
