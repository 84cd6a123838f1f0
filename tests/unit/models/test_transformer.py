from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mtlsign.models.transformer import Block, Transformer, TransformerShape, rotary_angles, rotate

SHAPE = TransformerShape(
    vocabulary=50, embedding=16, heads=4, kv_heads=4, head_size=4, inner=24, layers=2, length=12, classes=3
)


def transformer(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(SHAPE, **changes)).eval()


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_block_equals_encoder_layer_of_pytorch(order: Any, activation: str) -> None:
    torch.manual_seed(0)
    block = Block(replace(SHAPE, order=order, activation=activation)).eval()
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, 0.0, activation, batch_first=True, norm_first=order == "pre",
        layer_norm_eps=block.attention_norm.eps,  # type: ignore[arg-type]
    ).eval()  # fmt: skip
    attention, mlp = block.attention, block.mlp
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    layer.self_attn.out_proj.load_state_dict(attention.output.state_dict())
    layer.linear1.load_state_dict(mlp.up.state_dict())
    layer.linear2.load_state_dict(mlp.down.state_dict())
    x, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    with torch.no_grad():
        expected, actual = layer(x, src_key_padding_mask=~mask), block(x, mask)
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_padding_has_no_influence(pooling: str, positions: str) -> None:
    model = transformer(pooling=pooling, positions=positions, norm="rms", gated=1, activation="silu")
    tokens = torch.randint(1, 50, (4, 7))
    padded = torch.cat([tokens, torch.zeros(4, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(padded), model(tokens), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.int64))).all()


def test_causal_outputs_do_not_depend_on_later_tokens() -> None:
    model = transformer(causal=1, pooling="tokens", classes=50, kv_heads=2, bias=0, norm="rms")
    first = torch.randint(1, 50, (2, 8))
    second = first.clone()
    second[:, 5:] = torch.randint(1, 50, (2, 3))
    assert model(first).shape == (2, 8, 50)
    torch.testing.assert_close(model(first)[:, :5], model(second)[:, :5])
    assert not torch.allclose(model(first)[:, 5:], model(second)[:, 5:])


def test_rotary_products_depend_on_distances_only() -> None:
    query, key = torch.randn(4), torch.randn(4)
    angles = rotary_angles(9, 4, 10_000, torch.device("cpu"))
    products = rotate(query.expand(9, 4), angles) @ rotate(key.expand(9, 4), angles).T
    for distance in range(-8, 9):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-5, rtol=1e-5)


def test_grouped_heads_equal_repeated_keys_and_values() -> None:
    grouped, full = transformer(kv_heads=2), transformer()
    state = grouped.state_dict()
    for name, tensor in state.items():
        if ".attention.key." in name or ".attention.value." in name:
            state[name] = tensor.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = torch.randint(1, 50, (3, 6))
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)
