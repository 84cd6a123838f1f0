from __future__ import annotations

from typing import Any

import pytest

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.families import translation_of
from mtlsign.models.transformer import Transformer

ARCHITECTURE = architecture_for("transformer", classes=3, vocabulary=40, embedding=12, width=32)


def test_build_gives_network_of_the_recorded_sizes() -> None:
    model = build(ARCHITECTURE)
    assert isinstance(model, Transformer)
    assert (ARCHITECTURE["heads"], ARCHITECTURE["head_size"], ARCHITECTURE["inner"]) == (2, 16, 128)
    assert model.blocks[0].attention.query.weight.shape == (32, 12)
    assert not model.embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_heads": 3}, "kv_heads"), ({"positions": "rotary", "head_size": 5}, "head_size"),
        ({"norm": "batch"}, "norm"), ({"causal": 2}, "causal"), ({"heads": 0}, "heads"),
        ({"layers": 129}, "layers"), ({"activation": "sin"}, "activation"), ({"code": "x"}, "architecture"),
    ],
)  # fmt: skip
def test_build_of_other_values_raises_model_error(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError) as raised:
        build(ARCHITECTURE | changes)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("name", "target", "spelling"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "bert.blocks.3.attention.query.weight", "bert"),
        ("encoder.layer.0.output.LayerNorm.bias", "blocks.0.mlp_norm.bias", "bert"),
        ("embeddings.word_embeddings.weight", "embedding.weight", "bert"),
        ("model.layers.11.self_attn.o_proj.weight", "model.blocks.11.attention.output.weight", "llama"),
        ("model.layers.2.mlp.gate_proj.weight", "model.blocks.2.mlp.gate.weight", "llama"),
        ("model.embed_tokens.weight", "model.embedding.weight", "llama"),
        ("blk.7.ffn_down.weight", "blocks.7.mlp.down.weight", "gguf"),
        ("token_embd.weight", "embedding.weight", "gguf"),
    ],
)
def test_translation_of_names_of_other_libraries(name: str, target: str, spelling: str) -> None:
    translation = translation_of(name)
    assert translation is not None and (translation.target, translation.spelling) == (target, spelling)


@pytest.mark.parametrize(
    "name", ["encoder.layer.x.output.dense.weight", "layers.1.mlp.weight", "blk.1.ffn_x.weight"]
)
def test_translation_of_other_names_is_none(name: str) -> None:
    assert translation_of(name) is None
