"""Opened claims from strangers: kits, factories, wrong keys, endless work; suspects that cannot be read."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from mtlsign.service.problems import Problem
from mtlsign.service.verifier.claim_bundle import read_bundle, take_bundle, to_json
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.sealing import EncryptionSecret, encrypt_envelope
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.detector import WatermarkDetector, verify
from mtlsign.watermark.verification.heads import TrainedHead
from mtlsign.watermark.verification.reference import Reference
from tests.unit.service.fixtures import Goods, Service, bounded


def kind(call: Callable[[], Any]) -> str:
    with pytest.raises(Problem) as caught:
        call()
    return caught.value.kind


def remade(goods: Goods, owner: Identity, **changes: Any) -> dict[str, Any]:
    """The right bundle with another spec, signed again."""
    fields = json.loads(KeyOpening.from_json(json.dumps(goods.right["opening"])).spec) | changes
    return to_json(sign_spec(owner, make_spec(**fields)), base64.b64decode(goods.right["reference"]))


def test_kits_are_refused_in_every_form(goods: Goods) -> None:
    sealed = encrypt_envelope(b"kit", EncryptionSecret.from_passphrase(b"x" * 8), purpose="mtlsign/v0/kit")
    assert kind(lambda: read_bundle(sealed)) == "kit-refused"
    for name in ("kit", "w0", "seed", "kit_key", "info"):
        assert kind(partial(take_bundle, {**goods.right, name: 1})) == "kit-refused"


def test_damaged_openings_are_refused(goods: Goods) -> None:
    def changed(path: str, value: Any) -> dict[str, Any]:
        found = copy.deepcopy(goods.right)
        at = found
        *way, last = path.split("/")
        for step in way:
            at = at[step]
        at[last] = value
        return found

    signature = goods.right["opening"]["signature"]
    for path, value in {
        "opening/signature": signature[:-2] + ("00" if signature[-2:] != "00" else "01"),
        "opening/public_key": "00" * 32, "opening/spec": "!!", "opening/format": "x", "opening": [],
        "reference": 5,
        "head": base64.b64encode(b"x").decode(), "claim": "xyz", "more": 1,
    }.items():  # fmt: skip
        assert kind(partial(take_bundle, changed(path, value))) == "bad-bundle", path


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: b"PK\x03\x04" + b))
def test_any_bytes_are_a_problem(data: bytes) -> None:
    assert kind(lambda: read_bundle(data)) in ("bad-bundle", "kit-refused")


def test_factories_and_endless_work_are_refused(service: Service, goods: Goods, owner: Identity) -> None:
    huge = qr.make_carrier(4096, 1, 1024, 1024)
    deep = {"arch": "resnet50", "channels": 1, "classes": 2, "width": 128, "stem": "cifar"}
    wide = {"arch": "resnet18", "channels": 1, "classes": 2, "width": 10**9, "stem": "stock"}
    bundles = [
        remade(goods, owner, graph={"arch": "own/os:system", "command": "x"}),
        remade(goods, owner, graph={"arch": "resnet1001", "channels": 1, "classes": 2}),
        remade(
            goods,
            owner,
            graph=wide,
        ),
        remade(goods, owner, n=4096, carrier=huge),
        remade(goods, owner, n=4096, carrier=qr.make_carrier(4096, 1, 128, 128), graph=deep, taps=["layer4"]),
        remade(goods, owner, taps=["no.such.module"]),
        remade(goods, owner, carrier=qr.make_carrier(128, 3, 24, 24)),
    ]
    with bounded():
        results = service.ask(*[goods.claim(bundle=b) for b in bundles], goods.claim()).json()["results"]
    assert [r["problem"]["type"].rpartition(":")[2] for r in results[:-1]] == ["architecture-refused"] * 7
    assert results[-1]["verdict"]["status"] == "accepted"


def test_suspects_that_cannot_be_read_are_not_verifiable(service: Service, goods: Goods) -> None:
    whole = load(goods.marked)
    name = "layer1.0.conv1.weight"
    nan = {**whole, name: torch.full_like(whole[name], float("nan"))}
    infinite = {**whole, name: torch.full_like(whole[name], float("inf"))}
    shape = {**whole, name: torch.zeros(4, 4, 3, 3)}
    whole_numbers = {**whole, name: torch.zeros(whole[name].shape, dtype=torch.int8)}
    missing = {n: t for n, t in whole.items() if n != name}
    half = {n: t.half() if t.is_floating_point() else t for n, t in whole.items()}
    other_head = {**whole, "fc.weight": torch.zeros(77, 64), "fc.bias": torch.zeros(77)}
    claims = [
        goods.claim(goods.put(f"hostile/{i}.safetensors", save({n: t.contiguous() for n, t in one.items()})))
        for i, one in enumerate((nan, infinite, shape, whole_numbers, missing, half, other_head))
    ]
    claims.append(goods.claim(goods.put("hostile/x.safetensors", b"\x80\x04pickle")))
    with bounded():
        results = service.ask(*claims).json()["results"]
    found = [r["verdict"]["status"] for r in results[:-1]]
    assert found == ["not_verifiable"] * 5 + ["accepted"] * 2
    assert results[-1]["problem"]["type"].endswith("not-a-model")


def test_a_bundle_may_lie_behind_a_pointer(service: Service, goods: Goods) -> None:
    place = goods.put("bundles/right.json", json.dumps(goods.right).encode())
    results = service.ask(goods.claim(bundle=place), goods.claim(bundle="file:///etc/passwd")).json()[
        "results"
    ]
    assert results[0]["verdict"]["status"] == "accepted"
    assert results[1]["problem"]["type"].endswith("pointer-refused")


def test_shared_graphs_and_frames_change_no_bit(service: Service, goods: Goods) -> None:
    """The third claim on a model, in a graph built for another key, reads as `verify` does from nothing."""
    asked = [goods.claim(), goods.claim(bundle=goods.wrong), goods.claim()]
    for _ in range(2):
        results = [r["verdict"] for r in service.ask(*asked).json()["results"]]
        service.verifier._probes.clear()
        for claim, found in zip(asked, results, strict=True):
            opened = take_bundle(claim["bundle"])
            alone = verify(
                load(goods.marked), WatermarkDetector(opened.opening, Reference.from_bytes(opened.reference))
            )
            for name in ("matches", "evidence_bits", "near_zero", "status"):
                assert found[name] == getattr(alone, name)
    assert len(service.verifier._graphs) == 1


def test_two_heads_of_one_key_are_two_tests(service: Service, goods: Goods, owner: Identity) -> None:
    """A free head is no part of the key: whoever sends the same opening with another head is judged by it."""
    bundle = remade(goods, owner, head={"kind": "free", "hidden": 4, "features": "flat"})
    opening = KeyOpening.from_json(json.dumps(bundle["opening"]))
    reference = base64.b64decode(bundle["reference"])
    detector = WatermarkDetector(opening, Reference.from_bytes(reference))
    first, second = detector.head, copy.deepcopy(detector.head)
    assert isinstance(first, TrainedHead) and isinstance(second, TrainedHead)
    second.parameters()[2].data.neg_()
    bundles = [to_json(opening, reference, head.to_bytes()) for head in (first, second)]
    wanted = []
    for head in (first, second):
        detector.head = head
        wanted.append(verify(load(goods.marked), detector).matches)
    assert wanted[0] != wanted[1]
    for headers in (service.headers(), service.headers()):
        results = service.ask(*[goods.claim(bundle=one) for one in bundles], headers=headers).json()[
            "results"
        ]
        assert [r["verdict"]["matches"] for r in results] == wanted
