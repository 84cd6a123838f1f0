"""Claims on networks of texts: the service builds no tokenizer and runs no network."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch

from mtlsign.models.architectures import build
from mtlsign.service.verifier.claim_bundle import to_json
from mtlsign.storage.model_folder import model_bytes
from mtlsign.watermark.keys.opening import sign_spec
from mtlsign.watermark.keys.spec import make_spec
from tests.unit.attacks.helpers import run
from tests.unit.attacks.text_examples import marked_text_network, text_network, text_task
from tests.unit.attacks.transformer_examples import architecture, marked_transformer
from tests.unit.service.fixtures import ClaimFixtures, ServiceHarness, limit_memory_and_time


def bundle(**changes: Any) -> dict[str, Any]:
    """Return the claim's bundle, with changed fields of its spec."""
    _, result, owner = marked_text_network()
    opening = result.kit.opening
    if changes:
        opening = sign_spec(owner, make_spec(**(json.loads(opening.spec) | changes)))
    return to_json(opening, result.kit.reference)


def test_service_accepts_marked_text_network_after_free_changes(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    model, result, _ = marked_text_network()
    changed = run("recurrent_symmetries", model, text_task(), seed=4).model
    files = {
        "text": result.tensors,
        "changed": {name: t.contiguous() for name, t in changed.state_dict().items()},
        "half": {f"module.{name}": t.bfloat16() for name, t in model.state_dict().items()},
        "other": text_network(seed=9).state_dict(),
        "no_vectors": {n: t for n, t in model.state_dict().items() if not n.startswith("embedding")},
    }
    claims = [
        {"model": claim_fixtures.write(f"{name}.safetensors", model_bytes(tensors)), "bundle": bundle()}
        for name, tensors in files.items()
    ]
    items = service.verify(*claims).json()["results"]
    verdicts = {name: item["verdict"] for name, item in zip(files, items, strict=True)}
    assert [verdicts[name]["status"] for name in files] == [
        *("accepted", "accepted", "accepted", "unrelated", "accepted")
    ], verdicts
    assert [verdicts[name]["matches"] for name in ("text", "changed", "half")] == [128] * 3
    # Without word vectors, only the matrices that read the units' own outputs remain.
    assert verdicts["no_vectors"]["missing_layers"] == [
        "encoder.rnn.weight_ih_l0",
        "encoder.rnn.weight_ih_l0_reverse",
    ]


@pytest.mark.parametrize(
    "architecture",
    [
        {"vocabulary": 1_000_000, "embedding": 4096},
        {"hidden": 10_000}, {"layers": 5}, {"vocabulary": 81}, {"arch": "bigru"}, {"arch": "lstm"},
    ],
)  # fmt: skip
def test_service_refuses_text_claims_of_other_architectures(
    service: ServiceHarness, claim_fixtures: ClaimFixtures, architecture: dict[str, Any]
) -> None:
    _, result, _ = marked_text_network()
    spec = json.loads(result.kit.opening.spec)
    location = claim_fixtures.write("text.safetensors", model_bytes(result.tensors))
    with limit_memory_and_time():
        changed = bundle(architecture=spec["architecture"] | architecture)
        item = service.verify({"model": location, "bundle": changed}).json()["results"][0]
    assert "verdict" not in item or item["verdict"]["status"] != "accepted", item


def test_service_refuses_reference_without_word_vectors(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    _, result, _ = marked_text_network()
    location = claim_fixtures.write("text.safetensors", model_bytes(result.tensors))
    changed = bundle(carrier={"kind": "words", "base": 78, "digits": 4, "length": 8})
    changed["reference"] = base64.b64encode(b"0" * 100).decode()
    item = service.verify({"model": location, "bundle": changed}).json()["results"][0]
    assert "verdict" not in item


def test_service_accepts_marked_transformer_after_free_changes_and_under_names_of_libraries(
    service: ServiceHarness, claim_fixtures: ClaimFixtures
) -> None:
    model, result, _ = marked_transformer("rms")
    changed = run("rotate_stream+attention_symmetries", model, text_task(), seed=4).model
    parts = {"attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj"}
    parts |= {"attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj"}
    parts |= {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    parts |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    renamed = {"model.embed_tokens.weight": model.state_dict()["embedding.weight"]}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, number, part = name.removesuffix(".weight").split(".", 2)
            renamed[f"model.layers.{number}.{parts[part]}.weight"] = tensor
    torch.manual_seed(9)
    files = {
        "own": result.tensors,
        "changed": {name: t.contiguous() for name, t in changed.state_dict().items()},
        "renamed": {name: t.bfloat16() for name, t in renamed.items()},
        "other": build(architecture("rms")).state_dict(),
    }
    opened = to_json(result.kit.opening, result.kit.reference)
    claims = [
        {"model": claim_fixtures.write(f"t_{name}.safetensors", model_bytes(tensors)), "bundle": opened}
        for name, tensors in files.items()
    ]
    items = service.verify(*claims).json()["results"]
    verdicts = {name: item["verdict"] for name, item in zip(files, items, strict=True)}
    assert [verdicts[name]["status"] for name in files] == ["accepted", "accepted", "accepted", "unrelated"]
    assert {verdicts[name]["matches"] for name in ("own", "changed", "renamed")} == {128}
