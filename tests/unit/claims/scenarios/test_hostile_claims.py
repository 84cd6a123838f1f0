"""Scenario: hostile claims in a council's round. Each gets a vote within limits, as does the next claim."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.claims import owner
from mtlsign.claims.judging.isolated import IsolatedClaimVerifier
from mtlsign.claims.statements.types import Vote
from mtlsign.models import architectures
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.kit import OwnerKit
from mtlsign.watermark.verification.reference import make_reference
from tests.unit.claims.scenario import ALICE, ClaimScenario, keyed_opening

ARCHITECTURE: dict[str, Any] = architectures.architecture_for(
    "resnet18", channels=1, classes=4, width=8, stem="stock"
)
HEAVY = ARCHITECTURE | {"arch": "resnet50", "width": 128}
FREE = {"kind": "free", "hidden": 1024, "features": "flat"}


def changed(name: str, value: float) -> Callable[[bytes], bytes]:
    """Return the change of a reference that sets the tensors of one kind to a value."""
    return lambda data: serialize_safetensors(
        {
            key: torch.full_like(tensor, value) if key.endswith(name) else tensor
            for key, tensor in parse_safetensors(data).items()
        }
    )


#: Changes of the spec, change of the reference, and the head: the hostile claims of one round.
HOSTILE: dict[str, tuple[dict[str, Any], Callable[[bytes], bytes], bytes | None]] = {
    "680,000 GFLOP": (
        {
            "architecture": HEAVY,
            "taps": ["layer4"],
            "n": 4096,
            "carrier": qr.make_carrier(4096, 1, 128, 128),
        },
        bytes,
        None,
    ),
    "head of 68 bytes": ({"head": FREE}, bytes, serialize_safetensors({"w1": torch.zeros(1, 1)})),
    "no safetensors": ({}, lambda _: b"reference", None),
    "header of brackets": ({}, lambda _: (2**24).to_bytes(8, "little") + b"[]" * 2**23, None),
    "unknown architecture": ({"architecture": ARCHITECTURE | {"arch": "resnet19"}}, bytes, None),
    "unknown tap": ({"taps": ["layer9"]}, bytes, None),
    "unregistered factory": (
        {"architecture": ARCHITECTURE | {"arch": "custom/os:system"}},
        bytes,
        None,
    ),
    "eps of -1": ({}, changed("/eps", -1.0), None),
    "gamma of 3e38": ({}, changed("/gamma", 3e38), None),
}


def suspect(seed: int) -> bytes:
    torch.manual_seed(seed)
    return serialize_safetensors(dict(architectures.build(ARCHITECTURE).state_dict()))


def claim(scenario: ClaimScenario, kit: OwnerKit, model: bytes) -> str:
    """Publish a kit, archive its reference and claim a model."""
    scenario.archive.put(kit.reference)
    owner.publish(scenario.owner(ALICE), [kit])
    return scenario.claim(ALICE, [kit], model, own_model=model)


def kit_of(
    name: str, reference: bytes, spec: dict[str, Any], head: bytes | None, digest: str = ""
) -> OwnerKit:
    fields = {"architecture": ARCHITECTURE, "reference": hashlib.sha256(reference).hexdigest()}
    opening = keyed_opening(ALICE, name, **(fields | spec))
    return OwnerKit(opening, reference, b"w0", head, {"model_digest": digest})


def peak_memory(pid: int) -> int:
    """Return the largest resident size of a process in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory is read from Linux's /proc")
def test_run_member_round_with_hostile_claims_votes_on_each_and_on_the_sound_claim(tmp_path: Path) -> None:
    scenario = ClaimScenario(tmp_path, ["1"])
    torch.manual_seed(99)
    sound = make_reference(architectures.build(ARCHITECTURE), ["layer1"], torch.zeros(1, 1, 24, 24)).raw_bytes
    claims: dict[str, str] = {}
    for number, (name, (spec, change, head)) in enumerate(HOSTILE.items()):
        model = suspect(number)
        digest = hashlib.sha256(model).hexdigest()
        claims[name] = claim(scenario, kit_of(name, change(sound), spec, head, digest), model)
    model = suspect(100)
    last = claim(scenario, kit_of("sound", sound, {}, None, hashlib.sha256(model).hexdigest()), model)
    verifier = IsolatedClaimVerifier(seconds=280, memory_bytes=2**32)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        scenario.run_member(scenario.members[0], verifier)
        assert verifier._process is not None, "a claim exceeded its limits and ended the child"
        assert peak_memory(verifier._process.pid) < 2**30
    finally:
        verifier.close()
    votes = {vote.claim.leaf.hex(): vote for _, vote in scenario.view().all(Vote)}
    assert {name: votes[leaf].status for name, leaf in claims.items()} == dict.fromkeys(
        HOSTILE, "inadmissible"
    )
    assert all(votes[leaf].reason for leaf in claims.values())
    assert votes[last].status == "unrelated"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own < 2**18  # KiB
