"""Transformers of texts, and the names that other libraries give to their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from mtlsign.errors import ModelError
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import (
    CLASSES,
    EMBEDDING,
    VOCABULARY,
    ArchitectureFamily,
    ChoiceField,
    Field,
    IntegerField,
    Translation,
)
from mtlsign.models.transformer import ACTIVATIONS, NORM_EPS, Transformer, TransformerShape

NAME = "transformer"
_FLAG = IntegerField(0, 1, required=False)
#: Heads and neurons of `--model transformer` for a width.
_HEAD_SIZE, _EXPANSION, _LAYERS, _LENGTH = 16, 4, 2, 512

#: Parts of a block in the names of other libraries; the spelling names the library's kind of network.
_BLOCK_NAMES = (
    (
        "bert",
        re.compile(r"encoder\.layer\.([0-9]+)\.(.+)\.(weight|bias)"),
        {
            "attention.self.query": "attention.query",
            "attention.self.key": "attention.key",
            "attention.self.value": "attention.value",
            "attention.output.dense": "attention.output",
            "attention.output.LayerNorm": "attention_norm",
            "intermediate.dense": "mlp.up",
            "output.dense": "mlp.down",
            "output.LayerNorm": "mlp_norm",
        },
    ),
    (
        "llama",
        re.compile(r"layers\.([0-9]+)\.(.+)\.(weight|bias)"),
        {
            "self_attn.q_proj": "attention.query",
            "self_attn.k_proj": "attention.key",
            "self_attn.v_proj": "attention.value",
            "self_attn.o_proj": "attention.output",
            "input_layernorm": "attention_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
            "post_attention_layernorm": "mlp_norm",
        },
    ),
    (
        "gguf",
        re.compile(r"blk\.([0-9]+)\.(.+)\.(weight|bias)"),
        {
            "attn_q": "attention.query",
            "attn_k": "attention.key",
            "attn_v": "attention.value",
            "attn_output": "attention.output",
            "attn_norm": "attention_norm",
            "ffn_gate": "mlp.gate",
            "ffn_up": "mlp.up",
            "ffn_down": "mlp.down",
            "ffn_norm": "mlp_norm",
        },
    ),
)
_OTHER_NAMES = {
    "embeddings.word_embeddings.weight": ("embedding.weight", "bert"),
    "embeddings.position_embeddings.weight": ("positions.weight", "bert"),
    "embeddings.LayerNorm.weight": ("embedding_norm.weight", "bert"),
    "embeddings.LayerNorm.bias": ("embedding_norm.bias", "bert"),
    "embed_tokens.weight": ("embedding.weight", "llama"),
    "token_embd.weight": ("embedding.weight", "gguf"),
    "output_norm.weight": ("final_norm.weight", "gguf"),
}

#: Only these, because other networks have norms of this name, too.
_FINAL_NORMS = ("norm.weight", "model.norm.weight")


class TransformerFamily(ArchitectureFamily):
    """Transformer encoders and decoders of texts."""

    usage = NAME
    inputs: Literal["image", "text", "any"] = "text"
    fields: Mapping[str, Field] | None = {
        "vocabulary": VOCABULARY,
        "embedding": EMBEDDING,
        "heads": IntegerField(1, 256),
        "kv_heads": IntegerField(1, 256),
        "head_size": IntegerField(2, 512),
        "inner": IntegerField(1, 65_536),
        "layers": IntegerField(1, 128),
        "length": IntegerField(1, 2**20),
        "classes": CLASSES,
        "norm": ChoiceField(("layer", "rms"), required=False),
        "order": ChoiceField(("pre", "post"), required=False),
        "activation": ChoiceField(tuple(ACTIVATIONS), required=False),
        "gated": _FLAG,
        "positions": ChoiceField(("learned", "rotary"), required=False),
        "rotary_base": IntegerField(1, 2**31, required=False),
        "causal": _FLAG,
        "bias": _FLAG,
        "pooling": ChoiceField(("mean", "first", "last", "tokens"), required=False),
        "tied": _FLAG,
        "norm_eps": ChoiceField(NORM_EPS, required=False),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` is "transformer"."""
        return arch == NAME

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return two blocks of pre-norm attention; all heads together have `width` numbers."""
        heads = max(1, width // _HEAD_SIZE)
        return {
            "heads": heads,
            "kv_heads": heads,
            "head_size": max(2, width // heads),
            "inner": _EXPANSION * width,
            "layers": _LAYERS,
            "length": _LENGTH,
        }

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build a `Transformer`. Raises `ModelError` if its heads do not fit together."""
        shape = TransformerShape(**options)  # type: ignore[arg-type]
        if shape.heads % shape.kv_heads:
            raise ModelError(
                f"{shape.heads} heads cannot share {shape.kv_heads} heads of keys and values. "
                "Give a divisor of heads.",
                field="kv_heads",
            )
        if shape.positions == "rotary" and shape.head_size % 2:
            raise ModelError(
                f"Rotary positions need an even head_size, not {shape.head_size}. Change it.",
                field="head_size",
            )
        if shape.tied and shape.classes != shape.vocabulary:
            raise ModelError(
                f"Outputs that are tied to {shape.vocabulary} token vectors are as many, not "
                f"{shape.classes}. Correct it.",
                field="classes",
            )
        return Transformer(shape)

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the blocks of a network of this family."""
        if not isinstance(model, Transformer):
            return ()
        return tuple(f"blocks.{index}" for index in range(len(model.blocks)))

    def translation_of(self, name: str) -> Translation | None:
        """Return the name of a tensor of BERT and Llama in transformers, or of Llama in GGUF."""
        for spelling, pattern, parts in _BLOCK_NAMES:
            match = pattern.search(name)
            if match is not None and match.end() == len(name) and match[2] in parts:
                target = f"blocks.{match[1]}.{parts[match[2]]}.{match[3]}"
                return Translation(name[: match.start()] + target, spelling)
        if name in _FINAL_NORMS:
            return Translation(name.replace("norm", "final_norm"), "llama")
        for other, (target, spelling) in _OTHER_NAMES.items():
            if name == other or name.endswith(f".{other}"):
                return Translation(name[: -len(other)] + target, spelling)
        return None
