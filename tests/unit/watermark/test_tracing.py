"""Tests of several keys in one model, of further copies of one W0, and of tracing their recipients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mtlsign
from mtlsign.config.embed import EmbedSettings
from mtlsign.config.trace import TraceSettings
from mtlsign.errors import KeyMaterialError
from mtlsign.storage.locations import open_storage
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.base_kit import load_base_weights
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import detector_for_kit, write_kit
from mtlsign.watermark.tracing import trace
from mtlsign.watermark.verification.algorithm import verify

OPTIONS: dict[str, Any] = {
    "head": "spread",
    "key_size": 128,
    "phase2.steps": 30,
    "phase2.batch": 16,
    "phase2.lr": 0.005,
    "phase2.margin": 2.0,
    "insecure_test_key": True,
}
Copies = tuple[dict[str, Tensor], list[EmbeddingResult]]


@pytest.fixture(scope="module")
def copies(
    tiny_task: Task, tiny_model: Callable[..., nn.Module], tiny_graph: dict[str, object], owner: Identity
) -> Copies:
    """Return W0 and two copies of it: the first with two keys, the second for another recipient."""
    base_weights = {name: t.clone() for name, t in tiny_model().state_dict().items()}
    results = []
    cases: list[dict[str, Any]] = [{"keys": 2, "recipient": "Alice"}, {"recipient": "Bob"}]
    for seed, options in enumerate(cases):
        options |= OPTIONS | {"seed": seed, "trained": True, "identity": owner, "architecture": tiny_graph}
        results.append(mtlsign.embed(tiny_model(), tiny_task, **options))
    return base_weights, results


def test_embed_with_two_keys_gives_two_kits_that_verify_the_model(copies: Copies) -> None:
    first = copies[1][0]
    assert len(first.further_kits) == 1 == len(first.result["further_keys"])
    kits = [first.kit, *first.further_kits]
    assert kits[0].opening.key() != kits[1].opening.key() and kits[0].reference == kits[1].reference
    verdicts = [verify(first.tensors, detector_for_kit(kit), bits=60) for kit in kits]
    assert [v.status for v in verdicts] == ["accepted", "accepted"]
    assert first.result["further_keys"][0]["matches"] == verdicts[1].matches


def test_kit_with_spread_head_holds_all_of_base_weights(copies: Copies) -> None:
    base_weights, (first, _) = copies
    kept = parse_safetensors(first.kit.base_weights)
    assert kept.keys() == base_weights.keys()
    assert all(torch.equal(kept[name], base_weights[name]) for name in kept)


def test_load_base_weights_returns_base_weights_of_kit(
    copies: Copies, tiny_graph: dict[str, object], tiny_task: Task, owner: Identity, store_dir: str
) -> None:
    base_weights, (first, _) = copies
    secret = EncryptionSecret.from_kit_key(owner.kit_key)
    location = f"{store_dir}/kits/{write_kit(open_storage(store_dir), first.kit, secret)}"
    settings = EmbedSettings.of({"base_kit": location})
    weights = load_base_weights(settings, tiny_graph, secret)
    assert all(torch.equal(weights[name], base_weights[name]) for name in base_weights)
    with pytest.raises(KeyMaterialError, match=r"base-kit: .*width differ"):
        load_base_weights(settings, {**tiny_graph, "width": 16}, secret)
    with pytest.raises(KeyMaterialError, match="kit key"):
        load_base_weights(settings, tiny_graph, EncryptionSecret.from_kit_key(bytes(32)))


def test_load_base_weights_of_kit_with_a_part_of_them_raises(
    marked_model: tuple[dict[str, Tensor], Any],
    tiny_graph: dict[str, object],
    owner: Identity,
    store_dir: str,
) -> None:
    secret = EncryptionSecret.from_kit_key(owner.kit_key)
    kit_id = write_kit(open_storage(store_dir), marked_model[1].kit, secret)
    with pytest.raises(KeyMaterialError, match="only a part of W0"):
        load_base_weights(EmbedSettings.of({"base_kit": f"{store_dir}/kits/{kit_id}"}), tiny_graph, secret)


def test_trace_names_the_recipients_of_an_average_and_no_other(
    copies: Copies, owner: Identity, tmp_path: Path, store_dir: str
) -> None:
    first, second = copies[1]
    owner_file = tmp_path / "identity.json"
    owner.save(owner_file, None)
    secret, storage = EncryptionSecret.from_kit_key(owner.kit_key), open_storage(store_dir)
    kits = [f"{store_dir}/kits/{write_kit(storage, done.kit, secret)}" for done in (first, second)]
    second.save(storage, secret)
    mean = {
        name: (tensor + second.tensors[name]) / 2 if tensor.is_floating_point() else tensor
        for name, tensor in first.tensors.items()
    }
    average = tmp_path / "average.safetensors"
    save_file(mean, average)

    def traced(model: str, bits: float) -> dict[str | None, bool]:
        settings = TraceSettings.of(
            {"model": model, "kits": kits, "owner": owner_file, "min_evidence_bits": bits}
        )
        results = trace(settings)
        assert all(r.evidence_bits <= max(0.0, r.verdict.evidence_bits - math.log2(2)) for r in results)
        assert [r.evidence_bits for r in results] == sorted((r.evidence_bits for r in results), reverse=True)
        return {r.recipient: r.traced for r in results}

    assert traced(second.result["model_path"], 40) == {"Bob": True, "Alice": False}
    assert traced(str(average), 10) == {"Alice": True, "Bob": True}
