from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.attention_layers import attention_layers, preceding_norms
from mtlsign.models.residual_stream import residual_stream

IMAGES = torch.zeros(2, 3, 32, 32)


class Separate(nn.Module):
    """Attention with separate matrices, as transformers names them."""

    def __init__(self, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        self.q_proj, self.o_proj = nn.Linear(16, 4 * heads), nn.Linear(4 * heads, 16)
        self.k_proj, self.v_proj = nn.Linear(16, 4 * kv_heads), nn.Linear(16, 4 * kv_heads)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.q_proj(hidden) + (self.k_proj(hidden) + self.v_proj(hidden)).repeat(1, 1, 2)
        output: Tensor = self.o_proj(mixed)
        return output


class Network(nn.Module):
    """Norm, attention and a linear layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.fc = nn.LayerNorm(16), attention, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)[:, :, :3].repeat(1, 1, 6)[:, :, :16]
        normal = self.norm(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            x = x + self.attention(normal, normal, normal)[0]
        else:
            x = x + self.attention(hidden=normal)
        logits: Tensor = self.fc(x)
        return logits


def test_attention_layers_of_timm_have_thirds_of_joint_matrix() -> None:
    model = build(architecture_for("timm/vit_tiny_patch16_224", channels=3, classes=4, size=32))
    layers = attention_layers(model, ("blocks.1",), IMAGES)
    assert [layer.module for layer in layers] == ["blocks.0.attn", "blocks.1.attn"]
    first = layers[0]
    assert (first.heads, first.kv_heads, first.output) == (3, 3, "blocks.0.attn.proj.weight")
    rows = [(part.start, part.stop) for part in (first.query, first.key, first.value)]
    assert rows == [(0, 192), (192, 384), (384, 576)]
    assert first.weights == ("blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight")


def test_attention_layers_of_pytorch_and_of_separate_matrices_are_found() -> None:
    joint = Network(nn.MultiheadAttention(16, 2, batch_first=True))
    (layer,) = attention_layers(joint, ("fc",), IMAGES)
    assert (layer.heads, layer.query.weight) == (2, "attention.in_proj_weight")
    assert preceding_norms(joint, ("fc",), IMAGES) == {"attention": "norm"}
    separate = Network(Separate())
    (layer,) = attention_layers(separate, ("fc",), IMAGES)
    assert (layer.heads, layer.kv_heads) == (4, 2)
    assert layer.key.weight == "attention.k_proj.weight" and layer.key.stop == 8
    assert preceding_norms(separate, ("fc",), IMAGES) == {
        f"attention.{part}_proj": "norm" for part in ("q", "k", "v")
    }


@pytest.mark.parametrize(
    "attention",
    [nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True), nn.Identity(), Separate(kv_heads=3)],
)
def test_attention_layers_of_unknown_kinds_are_none(attention: nn.Module) -> None:
    if isinstance(attention, Separate):
        attention.num_key_value_heads = 2  # three heads of keys do not fit the stated number
        attention.forward = lambda hidden: attention.o_proj(attention.q_proj(hidden))  # type: ignore[method-assign]
    if isinstance(attention, nn.Identity):
        attention.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    assert attention_layers(Network(attention), ("fc",), IMAGES) == []


def test_residual_stream_of_vit_names_sources_readers_and_writers() -> None:
    model = build(architecture_for("timm/vit_tiny_patch16_224", channels=3, classes=4, size=32))
    stream = residual_stream(model, ("blocks.0",), IMAGES)
    assert stream is not None and stream.size == 192 and stream.subtracts_mean
    assert set(stream.sources) == {"patch_embed.proj.weight", "cls_token", "pos_embed"}
    assert stream.readers == {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    assert stream.writers == {"blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.weight"}
    assert stream.gains["blocks.0.mlp.fc1.weight"] == "blocks.0.norm2.weight"
    assert stream.norms["blocks.0.attn.query_key"] == "blocks.0.norm1"


def test_residual_stream_of_networks_without_attention_is_none() -> None:
    model = build(architecture_for("resnet18", channels=3, classes=4, width=8))
    assert residual_stream(model, ("layer4",), IMAGES) is None
