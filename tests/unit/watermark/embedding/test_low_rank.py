"""Marking a frozen base with an adapter of low rank: only the factors change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlsign
from mtlsign.errors import MTLSignError
from mtlsign.models.adapters import merge_adapter, read_adapter
from mtlsign.models.architectures import build
from mtlsign.storage.local import LocalStorage
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding.low_rank import LowRankTraining
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import detector_for_kit
from mtlsign.watermark.verification.algorithm import verify
from tests.unit.attacks.text_examples import OPTIONS, text_task
from tests.unit.attacks.transformer_examples import architecture

RANK, ALPHA = 4, 8


def base_network() -> nn.Module:
    torch.manual_seed(3)
    return build(architecture("rms"))


def matrices(model: nn.Module) -> list[str]:
    return [n for n, t in model.state_dict().items() if n.startswith("blocks.") and n.endswith("weight")
            and t.dim() == 2]  # fmt: skip


def adapter_folder(path: Path, model: nn.Module) -> Path:
    """Write an adapter with small random factors for every matrix of the blocks."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name in matrices(model):
        rows, columns = model.state_dict()[name].shape
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = 0.3 * torch.randn(RANK, columns, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = 0.05 * torch.randn(rows, RANK, generator=generator)
    path.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(serialize_safetensors(tensors))
    return path


def embed_adapter(folder: Path, **options: Any) -> tuple[nn.Module, EmbeddingResult, Identity]:
    model, owner = base_network(), Identity.generate()
    result = mtlsign.embed(
        model, text_task(), trained=True, identity=owner, architecture=architecture("rms"),
        **OPTIONS | {"adapter": str(folder), "phase2.lr": 0.01} | options,
    )  # fmt: skip
    return model, result, owner


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddingResult, Identity]:
    folder = adapter_folder(tmp_path_factory.mktemp("adapter") / "lora", base_network())
    _, result, owner = embed_adapter(folder)
    return folder, result, owner


def test_marked_adapter_changes_base_in_its_matrices_by_its_rank(
    marked: tuple[Path, EmbeddingResult, Identity],
) -> None:
    _, result, _ = marked
    base = base_network().state_dict()
    inner = matrices(base_network())
    assert result.verdict.matches == 128 and result.verdict.accepted
    for name, tensor in result.tensors.items():
        change = (tensor - base[name]).double()
        if name in inner:
            values = torch.linalg.svdvals(change)
            assert values[0] > 0 and float(values[RANK:].max()) < 1e-5 * float(values[0])
        else:
            assert torch.equal(tensor, base[name])


def test_mark_is_verified_merged_and_with_separate_factors(
    marked: tuple[Path, EmbeddingResult, Identity], tmp_path: Path
) -> None:
    folder, result, owner = marked
    storage = LocalStorage(tmp_path)
    result.save(storage, EncryptionSecret.from_kit_key(owner.kit_key))
    saved = tmp_path / "adapters" / result.result["model_digest"]
    assert result.result["adapter_path"].endswith(f"adapters/{saved.name}")
    assert (saved / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    base_file = tmp_path / "base.safetensors"
    base = base_network().state_dict()
    base_file.write_bytes(serialize_safetensors(base))
    merged = merge_adapter(saved, base_file)
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
    detector = detector_for_kit(result.kit)
    assert verify(merged, detector).matches == 128
    factors = parse_safetensors((saved / "adapter_model.safetensors").read_bytes())
    separate: dict[str, Tensor] = dict(base)
    for name, factor in factors.items():
        plain = name.removeprefix("base_model.model.")
        separate |= {plain: factor, f"{plain.split('.lora_')[0]}.lora_alpha": torch.tensor(float(ALPHA))}
    verdict = verify(separate, detector)
    assert verdict.matches == 128 and verdict.accepted
    unmarked = merge_adapter(folder, base_file)
    assert verify(unmarked, detector).evidence_bits < 20  # W0


def test_interrupted_marking_of_adapter_continues_with_equal_result(tmp_path: Path) -> None:
    from mtlsign.config.embed import EmbedSettings
    from mtlsign.watermark.embedding.phase2 import embed_watermark
    from mtlsign.watermark.embedding.worker import SingleProcessContext

    folder = adapter_folder(tmp_path / "lora", base_network())
    _, result, _ = embed_adapter(folder, **{"phase2.steps": 20})
    options = OPTIONS | {"task": "custom", "model": "transformer", "phase2.steps": 100, "phase2.lr": 0.01}
    settings = EmbedSettings.of(options).with_defaults()
    adapter = read_adapter(folder, base_network().state_dict())
    states: list[dict[str, Any]] = []
    outcomes = []
    for state in (None, "first"):
        model = base_network()
        model.load_state_dict(adapter.merged(model.state_dict()))
        worker = SingleProcessContext(
            on_checkpoint=lambda s: states.append(copy.deepcopy(s)), state=states[0] if state else None
        )
        low_rank = LowRankTraining(adapter)
        embed_watermark(model, text_task(), detector_for_kit(result.kit), settings, worker, low_rank)
        outcomes.append((model.state_dict(), low_rank.files()))
    assert len(states) == 3 and outcomes[0][1] == outcomes[1][1]
    assert all(torch.equal(tensor, outcomes[1][0][name]) for name, tensor in outcomes[0][0].items())


def test_gradients_of_factors_are_those_of_autograd(tmp_path: Path) -> None:
    model = base_network()
    adapter = read_adapter(adapter_folder(tmp_path / "lora", model), model.state_dict())
    model.load_state_dict(adapter.merged(model.state_dict()))
    low_rank = LowRankTraining(adapter)
    trained = low_rank.attach(dict(model.named_parameters()))
    name = matrices(model)[0]
    gradient = torch.randn(trained[name].shape, generator=torch.Generator().manual_seed(1))
    for weight in trained.values():
        weight.grad = torch.zeros_like(weight)
    trained[name].grad = gradient
    low_rank.set_gradients()
    down, up = (factor.detach().clone().requires_grad_() for factor in low_rank.factors(name))
    ((ALPHA / RANK) * (up @ down) * gradient).sum().backward()
    for factor, expected in zip(low_rank.factors(name), (down, up), strict=True):
        torch.testing.assert_close(factor.grad, expected.grad)
    before = trained[name].detach().clone()
    low_rank.update_weights()
    torch.testing.assert_close(trained[name], before, atol=1e-7, rtol=1e-6)
    assert not model.get_parameter("fc.weight").requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"base_model.model.fc.weight": torch.ones(3, 12)}, "no factors"),
        (lambda t: {n: v for n, v in t.items() if "0.mlp.up.lora_B" not in n}, "no second factor"),
        (lambda t: t | {"base_model.model.no.such.weight": torch.ones(1)}, "0 tensors for"),
        (lambda t: {n: v[:, :3] if n.endswith("lora_A.weight") else v for n, v in t.items()}, "fit"),
    ],
)
def test_other_adapter_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "lora", base_network())
    file = folder / "adapter_model.safetensors"
    file.write_bytes(serialize_safetensors(change(parse_safetensors(file.read_bytes()))))
    with pytest.raises(MTLSignError, match=message):
        embed_adapter(folder)


def test_adapter_of_untrained_module_and_of_fixed_vectors_is_refused(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "lora", base_network())
    with pytest.raises(MTLSignError, match="trained=True"):
        mtlsign.embed(
            base_network(), text_task(), identity=Identity.generate(), architecture=architecture("rms"),
            **OPTIONS | {"adapter": str(folder)},
        )  # fmt: skip
    with pytest.raises(MTLSignError, match=r"has no adapter_config\.json"):
        embed_adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    factors = parse_safetensors(file.read_bytes())
    factors["base_model.model.embedding.lora_A.weight"] = torch.zeros(2, 12)
    factors["base_model.model.embedding.lora_B.weight"] = torch.zeros(80, 2)
    file.write_bytes(serialize_safetensors(factors))
    with pytest.raises(MTLSignError, match="must not change"):
        embed_adapter(folder)
