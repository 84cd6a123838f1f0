"""Detectors: refused architectures, and shared verifier models that change no bit."""

from __future__ import annotations

import base64
import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from mtlsign.config.service import ServiceSettings
from mtlsign.service.problems import Problem
from mtlsign.service.verifier import verifier
from mtlsign.service.verifier.claim_bundle import OpenedClaim, parse_bundle, to_json
from mtlsign.service.verifier.detectors import check_compute_budget, detector_for_claim
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.compute_budget import ALIGNMENT_OPERATIONS
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.heads import TrainedHead
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.response_model import ResponseModel
from tests.unit.service.fixtures import ClaimFixtures, ServiceHarness, limit_memory_and_time
from tests.unit.watermark.verification import spread_examples


def test_check_compute_budget_with_factories_or_huge_cost_is_refused(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, owner: Identity
) -> None:
    changed = partial(claim_fixtures.changed_bundle, owner)
    huge = qr.make_carrier(4096, 1, 1024, 1024)
    deep = {"arch": "resnet50", "channels": 1, "classes": 2, "width": 128, "stem": "cifar"}
    wide = {"arch": "resnet18", "channels": 1, "classes": 2, "width": 10**9, "stem": "stock"}
    bundles = [
        changed(architecture={"arch": "custom/os:system", "command": "x"}),
        changed(architecture={"arch": "resnet1001", "channels": 1, "classes": 2}),
        changed(architecture=wide),
        changed(n=4096, carrier=huge),
        changed(n=4096, carrier=qr.make_carrier(4096, 1, 128, 128), architecture=deep, taps=["layer4"]),
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
    readout = detector.feature_readout
    first, second = readout.head, copy.deepcopy(readout.head)
    assert isinstance(first, TrainedHead) and isinstance(second, TrainedHead)
    second.parameters()[2].data.neg_()
    bundles = [to_json(opening, reference, head.to_bytes()) for head in (first, second)]
    expected = []
    for head in (first, second):
        readout.head = head
        expected.append(verify(load(claim_fixtures.model_bytes), detector).matches)
    assert expected[0] != expected[1]
    for headers in (service.headers(), service.headers()):
        results = service.verify(
            *[claim_fixtures.claim(bundle=bundle) for bundle in bundles], headers=headers
        ).json()["results"]
        assert [r["verdict"]["matches"] for r in results] == expected


def opened_claim(**changes: object) -> OpenedClaim:
    """Return a claim with a spread head whose architecture the verifier builds from a factory."""
    key_opening = spread_examples.opening(**changes)
    reference = spread_examples.example_reference()
    return parse_bundle(to_json(key_opening, reference.raw_bytes, None))


def suspect_file(folder: Path, tensors: dict[str, Tensor]) -> LazySafetensors:
    path = folder / "suspect.safetensors"
    path.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))
    return LazySafetensors(path, "digest")


FACTORIES = {spread_examples.FACTORY: lambda: spread_examples.network(9)}


@pytest.mark.parametrize("readouts", [1, [{"head": {"kind": "keyed"}, "taps": ["2"], "n": 128}]], ids=str)
def test_shared_spread_detector_gives_scores_of_fresh_detector(readouts: object, tmp_path: Path) -> None:
    first = opened_claim(readouts=readouts)
    second = opened_claim(readouts=readouts, nonce="cd" * 32)
    shared = detector_for_claim(first, FACTORIES)
    bare = shared.without_key_data()
    assert len(bare.labels) == 0 and len(shared.labels) == shared.spec.total_bits
    state = spread_examples.network(4).state_dict()
    del state["9.weight"]
    suspect, loads = suspect_file(tmp_path, state), 0
    for claim in (first, second, first):
        fresh = WatermarkDetector(claim.opening, spread_examples.example_reference(), factories=FACTORIES)
        expected, found = fresh.score_state_dict(state), bare.with_key(claim).score_state_dict(suspect)
        assert expected.scores is not None and found.scores is not None
        assert torch.equal(found.scores, expected.scores) and found.missing == ("9.weight",)
        assert verify(suspect, bare.with_key(claim)).matches == verify(state, fresh).matches
        loads = loads or suspect.loads
    assert suspect.loads == loads > 0, "each kernel is read once for all claims"
    assert verify(suspect, bare.with_key(first)).missing_layers == ("9.weight",)


def test_claims_with_other_numbers_of_readouts_are_scored_in_turn(tmp_path: Path) -> None:
    """Readings that are cached for one claim must not end a claim with more or fewer read-outs."""
    further = [{"head": {"kind": "spread"}, "taps": list(spread_examples.TAPS), "n": spread_examples.N}]
    factories = {spread_examples.FACTORY: lambda: spread_examples.network(9)}
    suspect = suspect_file(tmp_path, spread_examples.network(4).state_dict())
    sizes = []
    for readouts in (1, further, 1):
        detector = detector_for_claim(opened_claim(readouts=readouts), factories)
        scores = detector.score_state_dict(suspect).scores
        assert scores is not None
        sizes.append(len(scores))
    assert sizes == [spread_examples.N, 2 * spread_examples.N, spread_examples.N]


def test_key_bytes_are_those_of_all_readouts() -> None:
    keyed = {"head": {"kind": "keyed"}, "taps": ["2"], "n": 128}
    single, both = (
        detector_for_claim(opened_claim(readouts=readouts), FACTORIES) for readouts in (1, [keyed])
    )
    model = single.readouts[0].model
    assert isinstance(model, ResponseModel) and single.key_bytes == 9 * model.coordinates
    assert both.key_bytes == single.key_bytes + 128 * 21 * 21 * 4


def test_model_bytes_of_detectors_that_share_a_model_count_once() -> None:
    factories = {spread_examples.FACTORY: lambda: spread_examples.network(9)}
    first = detector_for_claim(opened_claim(), factories)
    sharing = first.with_key(opened_claim(nonce="cd" * 32))
    other = detector_for_claim(opened_claim(nonce="ef" * 32), factories)
    size = sum(
        t.numel() * t.element_size()
        for name, t in spread_examples.example_reference().tensors.items()
        if name.rpartition("/")[2] in ("basis", "columns")
    )
    assert verifier._model_bytes([first, sharing]) == size
    assert verifier._model_bytes([first, sharing, other]) == 2 * size


def test_suspect_without_readable_layers_is_cached_with_its_problem(tmp_path: Path) -> None:
    detector = detector_for_claim(opened_claim(), FACTORIES)
    suspect = suspect_file(tmp_path, {"x": torch.ones(1)})
    for _ in range(2):
        verdict = verify(suspect, detector)
        assert verdict.status == "not_verifiable" and verdict.reason is not None
    assert suspect.cached is not None and suspect.cached.readings[0].problem == verdict.reason


def test_suspect_with_decoys_is_read_in_each_place(tmp_path: Path) -> None:
    claim = opened_claim()
    detector = detector_for_claim(claim, FACTORIES)
    real, decoys = spread_examples.network(4).state_dict(), spread_examples.network(5).state_dict()
    both = {f"net.{name}": t for name, t in real.items()} | decoys
    results = detector.score_all(suspect_file(tmp_path, both))
    expected = [*detector.score_all(decoys), *detector.score_all(real)]
    assert len(results) == 4, "each in its own order, and aligned"
    for result, single in zip(results, expected, strict=True):
        assert result.scores is not None and single.scores is not None
        assert torch.equal(result.scores, single.scores)


def test_check_compute_budget_of_spread_head_counts_products_and_layers() -> None:
    service = ServiceSettings.of({})
    cost = check_compute_budget(opened_claim().spec, service, FACTORIES)
    parameters = sum(p.numel() for p in spread_examples.network().parameters())
    products = (2 * 256 + ALIGNMENT_OPERATIONS) * parameters / 1e9
    assert products < cost < products + 0.01
    keyed = {"head": {"kind": "keyed"}, "taps": ["2"], "n": 128}
    assert check_compute_budget(opened_claim(readouts=[keyed]).spec, service, FACTORIES) > cost
    small = ServiceSettings.of({"max_gflop": cost / 2})
    with pytest.raises(Problem) as caught:
        check_compute_budget(opened_claim().spec, small, FACTORIES)
    assert caught.value.kind == "architecture-refused"
    with pytest.raises(Problem):
        check_compute_budget(opened_claim(taps=["99"]).spec, service, FACTORIES)
