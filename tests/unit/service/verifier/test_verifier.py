"""Verifier: caching, time limit and memory limit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from mtlsign.config.service import ServiceSettings
from mtlsign.service.verifier.detectors import SharedDetector, detector_for_claim
from mtlsign.service.verifier.verifier import ClaimTimeout, DeadlineMode, _is_allocation_failure
from mtlsign.watermark.verification.scores import ScoreResult
from tests.unit.service.fixtures import (
    ClaimFixtures,
    ServiceFactory,
    ServiceHarness,
    limit_memory_and_time,
    problem_type,
    statuses,
)


def test_claims_on_one_model_share_download_and_tensors(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    service.verify(claim_fixtures.claim(), claim_fixtures.claim(bundle=claim_fixtures.wrong_bundle))
    (suspect,) = service.verifier._suspects.values
    loads = suspect.loads
    assert 0 < loads < len(suspect)  # only the tensors of the taps are read
    service.verify(*[claim_fixtures.claim() for _ in range(5)])
    assert service.verifier.fetcher.downloads == 1 and suspect.loads == loads


def test_claim_over_time_limit_ends_without_ending_verifier(
    start_service: ServiceFactory, claim_fixtures: ClaimFixtures
) -> None:
    service = start_service(claim_timeout_s=1e-9)
    assert statuses(service.verify(claim_fixtures.claim())) == ["too-long"]
    assert service.verifier.busy_since is None
    service.verifier.settings = ServiceSettings.of(
        {"state_dir": service.state.settings.state_dir, "claim_timeout_s": 60}
    )
    assert statuses(service.verify(claim_fixtures.claim())) == ["accepted"]


def test_unreadable_models_are_not_verifiable(service: ServiceHarness, claim_fixtures: ClaimFixtures) -> None:
    tensors = load(claim_fixtures.model_bytes)
    name = "layer1.0.conv1.weight"
    nan = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    infinite = {**tensors, name: torch.full_like(tensors[name], float("inf"))}
    shape = {**tensors, name: torch.zeros(4, 4, 3, 3)}
    integers = {**tensors, name: torch.zeros(tensors[name].shape, dtype=torch.int32)}
    missing = {n: t for n, t in tensors.items() if n != name}
    half = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    other_head = {**tensors, "fc.weight": torch.zeros(77, 64), "fc.bias": torch.zeros(77)}
    claims = [
        claim_fixtures.claim(
            claim_fixtures.write(
                f"hostile/{i}.safetensors", save({n: t.contiguous() for n, t in one.items()})
            )
        )
        for i, one in enumerate((nan, infinite, shape, integers, missing, half, other_head))
    ]
    claims.append(claim_fixtures.claim(claim_fixtures.write("hostile/x.safetensors", b"\x80\x04pickle")))
    with limit_memory_and_time():
        results = service.verify(*claims).json()["results"]
    verdicts = [r["verdict"]["status"] for r in results[:-1]]
    assert verdicts == ["not_verifiable"] * 5 + ["accepted"] * 2
    assert results[-1]["problem"]["type"].endswith("not-a-model")


def test_bundle_at_location_is_fetched(service: ServiceHarness, claim_fixtures: ClaimFixtures) -> None:
    location = claim_fixtures.write("bundles/right.json", json.dumps(claim_fixtures.right_bundle).encode())
    results = service.verify(
        claim_fixtures.claim(bundle=location), claim_fixtures.claim(bundle="file:///etc/passwd")
    ).json()["results"]
    assert results[0]["verdict"]["status"] == "accepted"
    assert results[1]["problem"]["type"].endswith("pointer-refused")


class GreedyDetector(SharedDetector):
    """Detector that allocates more memory than any machine has."""

    def score_all_keys(self, tensors: Any, others: Any) -> Any:
        return [[ScoreResult(torch.empty(2**60))]]


def test_claim_with_too_large_allocation_gives_problem_too_large(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mtlsign.service.verifier.verifier.detector_for_claim", _greedy_detector)
        results = service.verify(claim_fixtures.claim()).json()["results"]
    assert problem_type(results[0]) == "too-large"
    assert service.verifier.busy_since is None
    other = claim_fixtures.claim(bundle=claim_fixtures.wrong_bundle)
    service.verifier._detectors.clear()
    service.verifier._graphs.clear()
    assert statuses(service.verify(claim_fixtures.claim(), other)) == ["accepted", "rejected"]


def _greedy_detector(opened: Any, factories: Any, *, device: str) -> SharedDetector:
    detector = detector_for_claim(opened, factories, device=device)
    detector.__class__ = GreedyDetector
    return detector


def test_is_allocation_failure_recognizes_allocators_only() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert _is_allocation_failure(caught.value)
    assert _is_allocation_failure(torch.OutOfMemoryError("CUDA out of memory"))
    assert not _is_allocation_failure(RuntimeError("shape mismatch: alloc"))


def test_deadline_mode_converts_allocation_failure_to_memory_error() -> None:
    with pytest.raises(MemoryError), DeadlineMode(60):
        torch.empty(2**60)
    with pytest.raises(ClaimTimeout), DeadlineMode(-1):
        torch.add(torch.ones(1), 1)
