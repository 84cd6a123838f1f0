"""Detectors: refused architectures, and shared verifier models that change no bit."""

from __future__ import annotations

import base64
import copy
import json
from functools import partial

from safetensors.torch import load

from mtlsign.service.verifier.claim_bundle import parse_bundle, to_json
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.detector import WatermarkDetector, verify
from mtlsign.watermark.verification.heads import TrainedHead
from mtlsign.watermark.verification.reference import Reference
from tests.unit.service.fixtures import ClaimFixtures, ServiceHarness, limit_memory_and_time


def test_check_compute_budget_with_factories_or_huge_cost_is_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, owner: Identity
) -> None:
    changed = partial(claim_fixtures.changed_bundle, owner)
    huge = qr.make_carrier(4096, 1, 1024, 1024)
    deep = {"arch": "resnet50", "channels": 1, "classes": 2, "width": 128, "stem": "cifar"}
    wide = {"arch": "resnet18", "channels": 1, "classes": 2, "width": 10**9, "stem": "stock"}
    bundles = [
        changed(graph={"arch": "own/os:system", "command": "x"}),
        changed(graph={"arch": "resnet1001", "channels": 1, "classes": 2}),
        changed(graph=wide),
        changed(n=4096, carrier=huge),
        changed(n=4096, carrier=qr.make_carrier(4096, 1, 128, 128), graph=deep, taps=["layer4"]),
        changed(taps=["no.such.module"]),
        changed(carrier=qr.make_carrier(128, 3, 24, 24)),
    ]
    with limit_memory_and_time():
        results = service.verify(
            *[claim_fixtures.claim(bundle=b) for b in bundles], claim_fixtures.claim()
        ).json()["results"]
    assert [r["problem"]["type"].rpartition(":")[2] for r in results[:-1]] == ["architecture-refused"] * 7
    assert results[-1]["verdict"]["status"] == "accepted"


def test_shared_detector_gives_same_bits_as_fresh_detector(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    """A verifier model built for another key gives the same scores as `verify` without any cache."""
    claims = [
        claim_fixtures.claim(),
        claim_fixtures.claim(bundle=claim_fixtures.wrong_bundle),
        claim_fixtures.claim(),
    ]
    for _ in range(2):
        results = [r["verdict"] for r in service.verify(*claims).json()["results"]]
        service.verifier._detectors.clear()
        for claim, verdict in zip(claims, results, strict=True):
            opened = parse_bundle(claim["bundle"])
            fresh = verify(
                load(claim_fixtures.model_bytes),
                WatermarkDetector(opened.opening, Reference.from_bytes(opened.reference)),
            )
            for name in ("matches", "evidence_bits", "near_zero", "status"):
                assert verdict[name] == getattr(fresh, name)
    assert len(service.verifier._graphs) == 1


def test_two_heads_of_one_key_use_separate_detectors(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, owner: Identity
) -> None:
    """A trained head is not derived from the key, so each head needs a detector that uses it."""
    bundle = claim_fixtures.changed_bundle(owner, head={"kind": "free", "hidden": 4, "features": "flat"})
    opening = KeyOpening.from_json(json.dumps(bundle["opening"]))
    reference = base64.b64decode(bundle["reference"])
    detector = WatermarkDetector(opening, Reference.from_bytes(reference))
    first, second = detector.head, copy.deepcopy(detector.head)
    assert isinstance(first, TrainedHead) and isinstance(second, TrainedHead)
    second.parameters()[2].data.neg_()
    bundles = [to_json(opening, reference, head.to_bytes()) for head in (first, second)]
    expected = []
    for head in (first, second):
        detector.head = head
        expected.append(verify(load(claim_fixtures.model_bytes), detector).matches)
    assert expected[0] != expected[1]
    for headers in (service.headers(), service.headers()):
        results = service.verify(
            *[claim_fixtures.claim(bundle=bundle) for bundle in bundles], headers=headers
        ).json()["results"]
        assert [r["verdict"]["matches"] for r in results] == expected
