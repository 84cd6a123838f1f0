from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.architectures import build
from mtlsign.models.pretrained_transformer import in_original_names, load_pretrained_transformer
from mtlsign.models.transformer import Transformer
from mtlsign.storage.safetensors_io import serialize_safetensors

BERT = {
    "model_type": "bert", "vocab_size": 30, "hidden_size": 16, "num_attention_heads": 4, "hidden_act": "gelu",
    "intermediate_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 12, "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute", "type_vocab_size": 2, "is_decoder": False,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 30, "hidden_size": 16, "num_attention_heads": 4,
    "hidden_act": "silu", "num_key_value_heads": 2, "intermediate_size": 20, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 12, "rope_theta": 5000.0, "attention_bias": False,
    "tie_word_embeddings": True,
}  # fmt: skip
PARTS = {
    "bert": {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
    },
    "llama": {
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "attention_norm": "input_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj", "mlp_norm": "post_attention_layernorm",
    },
}  # fmt: skip
OTHERS = {
    "bert": {
        "embedding": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    },
    "llama": {"embedding": "model.embed_tokens", "final_norm": "model.norm"},
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"norm": "layer", "order": "post", "norm_eps": "1e-12", "kv_heads": 4},
    "llama": {
        "norm": "rms", "positions": "rotary", "gated": 1, "activation": "silu", "bias": 0, "causal": 1,
        "kv_heads": 2, "rotary_base": 5000, "pooling": "tokens", "tied": 1, "classes": 30,
    },
}  # fmt: skip
TOKENS = torch.randint(1, 30, (3, 9), generator=torch.Generator().manual_seed(0))


def network(kind: str) -> Transformer:
    torch.manual_seed(1)
    sizes = {
        "arch": "transformer", "vocabulary": 30, "embedding": 16, "heads": 4, "head_size": 4, "inner": 20,
        "layers": 2, "length": 12, "classes": 2,
    }  # fmt: skip
    model = build(sizes | ARCHITECTURES[kind]).eval()
    assert isinstance(model, Transformer)
    return model


def library_tensors(kind: str, model: Transformer) -> dict[str, Tensor]:
    """Return the tensors under the names of the transformers library."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner.startswith("blocks."):
            _, number, part = owner.split(".", 2)
            prefix = "encoder.layer" if kind == "bert" else "model.layers"
            tensors[f"{prefix}.{number}.{PARTS[kind][part]}.{leaf}"] = tensor
        elif owner in OTHERS[kind]:
            tensors[f"{OTHERS[kind][owner]}.{leaf}"] = tensor
    return tensors


def folder(path: Path, kind: str, **changes: Any) -> Path:
    config = (BERT if kind == "bert" else LLAMA) | changes
    (path / "config.json").write_text(json.dumps(config))
    tensors = library_tensors(kind, network(kind))
    if kind == "bert":
        positions = "embeddings.position_embeddings.weight"
        types = torch.arange(32.0).reshape(2, 16) / 10
        tensors |= {
            "embeddings.token_type_embeddings.weight": types,
            positions: tensors[positions] - types[0],
        }
    (path / "model.safetensors").write_bytes(serialize_safetensors(tensors))
    return path


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_folder_gives_network_of_equal_outputs_and_its_own_tensors(kind: str, tmp_path: Path) -> None:
    classes = 2 if kind == "bert" else None
    loaded = load_pretrained_transformer(folder(tmp_path, kind), classes=classes)
    expected = network(kind)
    torch.testing.assert_close(loaded.network.encode(TOKENS), expected.encode(TOKENS), atol=1e-5, rtol=1e-5)
    if kind == "llama":
        torch.testing.assert_close(loaded.network(TOKENS), expected(TOKENS), atol=1e-5, rtol=1e-5)
    else:
        assert loaded.network(TOKENS).shape == (3, 2)
    names = {name: t.shape for name, t in build(dict(loaded.architecture)).state_dict().items()}
    assert names == {name: t.shape for name, t in loaded.network.state_dict().items()}
    back = loaded.in_original_names(loaded.network.state_dict())
    assert back.keys() == loaded.original.keys()
    assert all(torch.equal(tensor, loaded.original[name]) for name, tensor in back.items())


def changed_state(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of a network with noise on each, as after training."""
    generator = torch.Generator().manual_seed(3)
    state = model.state_dict()
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def assert_equal_encodings(model: Transformer, state: dict[str, Tensor], other: Transformer) -> None:
    model.load_state_dict(state)
    torch.testing.assert_close(other.encode(TOKENS), model.encode(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_trained_network_is_written_and_loaded_again(kind: str, tmp_path: Path) -> None:
    loaded = load_pretrained_transformer(folder(tmp_path, kind), classes=2)
    state = changed_state(loaded.network)
    tensors = in_original_names(tmp_path, state)
    assert tensors.keys() == loaded.original.keys()
    (tmp_path / "model.safetensors").write_bytes(serialize_safetensors(tensors))
    again = load_pretrained_transformer(tmp_path, classes=2).network
    assert_equal_encodings(loaded.network, state, again)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_language_model_is_written_with_its_outputs(tied: bool, tmp_path: Path) -> None:
    folder(tmp_path, "llama", tie_word_embeddings=tied)
    if not tied:
        file = tmp_path / "model.safetensors"
        with pytest.raises(ModelError, match="no matrix of outputs"):
            load_pretrained_transformer(tmp_path)
        head = torch.randn(30, 16, generator=torch.Generator().manual_seed(5))
        tensors = library_tensors("llama", network("llama")) | {"lm_head.weight": head}
        file.write_bytes(serialize_safetensors(tensors))
    loaded = load_pretrained_transformer(tmp_path)
    assert loaded.network.shape.tied == int(tied)
    state = changed_state(loaded.network)
    written = in_original_names(tmp_path, state)
    (tmp_path / "model.safetensors").write_bytes(serialize_safetensors(written))
    again = load_pretrained_transformer(tmp_path).network
    loaded.network.load_state_dict(state)
    torch.testing.assert_close(again(TOKENS), loaded.network(TOKENS), atol=1e-5, rtol=1e-5)


def test_in_original_names_of_another_network_raises_model_error(tmp_path: Path) -> None:
    folder(tmp_path, "llama")
    with pytest.raises(ModelError, match="do not come from this"):
        in_original_names(tmp_path, network("bert").state_dict())


def test_base_of_rotary_positions_is_read_in_both_forms(tmp_path: Path) -> None:
    loaded = load_pretrained_transformer(folder(tmp_path, "llama"))
    assert loaded.architecture["rotary_base"] == 5000
    parameters = {"rope_type": "default", "rope_theta": 700.0}
    loaded = load_pretrained_transformer(folder(tmp_path, "llama", rope_parameters=parameters))
    assert loaded.architecture["rotary_base"] == 700


def test_decoder_with_classes_pools_the_last_token(tmp_path: Path) -> None:
    loaded = load_pretrained_transformer(folder(tmp_path, "llama"), classes=5)
    assert loaded.architecture["pooling"] == "last" and loaded.network(TOKENS).shape == (3, 5)


GGUF_PARTS = {
    "attention.query": "attn_q", "attention.key": "attn_k", "attention.value": "attn_v",
    "attention.output": "attn_output", "attention_norm": "attn_norm", "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up", "mlp.down": "ffn_down", "mlp_norm": "ffn_norm",
}  # fmt: skip


def gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors as a GGUF file stores them, with pairs of rotary positions as neighbours."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner.startswith("blocks."):
            _, number, part = owner.split(".", 2)
            target = f"blk.{number}.{GGUF_PARTS[part]}.weight"
            if part in ("attention.query", "attention.key"):
                tensor = tensor.reshape(-1, 2, 2, 16).transpose(1, 2).reshape(tensor.shape)
        else:
            target = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight"}[owner]
        tensors[target] = tensor
    return tensors


def write_gguf(path: Path, tensors: dict[str, Tensor]) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(12)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(20)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_network_of_equal_outputs_and_its_own_tensors(tmp_path: Path) -> None:
    model = network("llama")
    loaded = load_pretrained_transformer(write_gguf(tmp_path / "model.gguf", gguf_tensors(model)))
    torch.testing.assert_close(loaded.network(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)
    back = loaded.in_original_names(loaded.network.state_dict())
    assert all(torch.equal(tensor, loaded.original[name]) for name, tensor in back.items())
    state = changed_state(loaded.network)
    written = write_gguf(tmp_path / "changed.gguf", loaded.in_original_names(state))
    assert_equal_encodings(loaded.network, state, load_pretrained_transformer(written).network)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bert", {"model_type": "t5"}, "'t5' is not supported"),
        ("bert", {"hidden_act": "tanh"}, "'hidden_act'"),
        ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type'"),
        ("bert", {"layer_norm_eps": 0.5}, "0.5"),
        ("bert", {"hidden_size": "16"}, "'hidden_size'"),
        ("bert", {"num_hidden_layers": 3}, "blocks.2"),
        ("bert", {"intermediate_size": 21}, "should be"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'rope_scaling'"),
        ("llama", {"num_key_value_heads": 3}, "heads"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0}}, "rotary positions"),
    ],
)
def test_folder_of_unsupported_kind_raises_model_error(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        load_pretrained_transformer(folder(tmp_path, kind, **changes), classes=2)


def test_missing_or_damaged_files_raise_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_pretrained_transformer(tmp_path, classes=2)
    with pytest.raises(ModelError, match="does not exist"):
        load_pretrained_transformer(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF damaged")
    with pytest.raises(ModelError, match="cannot be read"):
        load_pretrained_transformer(tmp_path / "x.gguf")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_pretrained_transformer(tmp_path, classes=2)


def test_encoder_without_classes_raises_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="number of classes"):
        load_pretrained_transformer(folder(tmp_path, "bert"))
