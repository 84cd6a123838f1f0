"""Networks of the library transformers, as folders that it wrote, have equal outputs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtlsign.models.pretrained_transformer import load_pretrained_transformer
from mtlsign.storage.safetensors_io import serialize_safetensors

pytestmark = pytest.mark.slow
COMMAND = "uv run --dev --extra architectures pytest -m slow tests/architectures -n 0"

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
}
TOKENS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(0))


def library() -> Any:
    """Return the library transformers, which the ordinary tests do not install."""
    return pytest.importorskip("transformers", reason=f"transformers is missing: {COMMAND}")


def saved(kind: str, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(library(), f"{kind}Config")(**SIZES, **options)
    name = f"{kind}Model" if kind == "Bert" else f"{kind}ForCausalLM"
    model = getattr(library(), name)(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_bert_has_equal_outputs_also_with_padding(activation: str, tmp_path: Path) -> None:
    model = saved("Bert", tmp_path, hidden_act=activation)
    tokens = TOKENS.clone()
    tokens[1, 6:] = 0
    loaded = load_pretrained_transformer(tmp_path, classes=2)
    with torch.no_grad():
        expected = model(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        actual = loaded.network.encode(tokens)
    torch.testing.assert_close(actual[tokens != 0], expected[tokens != 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_decoder_has_equal_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_key_value_heads": 2, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}
    if tied:
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 50_000.0}
    if kind == "Mistral":
        options["sliding_window"] = None
    model = saved(kind, tmp_path, **options)
    loaded = load_pretrained_transformer(tmp_path)
    assert loaded.network.shape.tied == int(tied)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(TOKENS), model(TOKENS).logits, atol=2e-5, rtol=1e-4)


def test_marked_weights_return_to_the_library(tmp_path: Path) -> None:
    saved("Llama", tmp_path, num_key_value_heads=4, tie_word_embeddings=True)
    loaded = load_pretrained_transformer(tmp_path)
    with torch.no_grad():
        for block in loaded.network.block_list():
            block.mlp.down.weight.mul_(1.1)
            block.attention.query.weight.add_(0.01)
    tensors = loaded.in_original_names(loaded.network.state_dict())
    (tmp_path / "model.safetensors").write_bytes(serialize_safetensors(tensors))
    model = library().LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(TOKENS), model(TOKENS).logits, atol=2e-5, rtol=1e-4)
